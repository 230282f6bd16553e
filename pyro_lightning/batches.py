"""What a batch holds: its rows, and how its elements become arguments."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from pyro_lightning.rows import data_of


def named_tensors(batch: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk the tensors of a batch, each with the expression that reaches it."""
    if isinstance(batch, torch.Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from named_tensors(value, f"{path}[{key!r}]")
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for i, value in enumerate(batch):
            yield from named_tensors(value, f"{path}[{i}]")


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to every tensor of a batch, keeping the batch's structure."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [map_tensors(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def count_rows(batch: Any) -> int:
    """Count B, the rows of a batch: the first dimension that all its tensors share.

    Tensors without dimensions are passed over.

    Raises:
        ValueError: When there is no row, or when two tensors disagree.

    Example:
        >>> count_rows((torch.zeros(3, 2), {"y": torch.zeros(3)}))
        3
    """
    batch = data_of(batch)
    rows = {path: t.shape[0] for path, t in named_tensors(batch, "batch") if t.dim() > 0}
    if not rows:
        raise ValueError(
            f"a batch must hold a tensor with a row dimension; got {type(batch).__name__} without "
            "any. Override num_rows(batch) if its rows are counted in another way."
        )
    if len(set(rows.values())) > 1:
        sizes = ", ".join(f"{path} has {n}" for path, n in rows.items())
        raise ValueError(
            f"the tensors of a batch disagree on its number of rows: {sizes}. Override "
            "num_rows(batch) if some of them are not indexed by row."
        )
    count = next(iter(rows.values()))
    if count == 0:
        raise ValueError("the batch is empty (0 rows): drop it in the sampler or the collate_fn")
    return count


def batch_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn a batch into the arguments of model and guide.

    A tuple or list becomes positional arguments, a mapping keywords, anything else one argument.

    Raises:
        TypeError: For a key that is no string.

    Example:
        >>> batch_arguments([1, 2])
        ((1, 2), {})
        >>> batch_arguments({"x": 1})
        ((), {'x': 1})
    """
    batch = data_of(batch)
    if isinstance(batch, Mapping):
        odd = [key for key in batch if not isinstance(key, str)]
        if odd:
            raise TypeError(
                f"a batch that is a mapping becomes keyword arguments, and its key {odd[0]!r} is "
                "no string. Override model_inputs(batch)."
            )
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    return (batch,), {}


def first_of(loaders: Any) -> Any:
    """Return the first of several loaders, which validate one after the other; or the only one."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    return (loaders[0] if loaders else None) if isinstance(loaders, tuple | list) else loaders


def rows_at_set_up(loader: Any) -> Any:
    """Return the row numbers of a map-style data set from which a batch can be taken, or None."""
    batches = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if not batches or isinstance(loader.dataset, IterableDataset):
        return None
    return getattr(loader.sampler, "indices", range(len(loader.dataset)))


def example_batch(loader: Any, start: int = 0) -> Any:
    """Take one batch as a loader would make it, in this process, without moving its sampler.

    A map-style data set is asked for its first rows, so that neither the sampler's random state
    nor the loader's workers are touched. Several loaders give a batch of each. Anything else is
    iterated once.

    Args:
        loader: The loader, or several.
        start: Which row of a map-style data set is the first of the batch.

    Raises:
        ValueError: When a stream can be iterated only once.
    """
    if isinstance(loader, Mapping):
        return {name: example_batch(each) for name, each in loader.items()}
    if isinstance(loader, tuple | list):
        return [example_batch(each) for each in loader]
    if not isinstance(loader, DataLoader):
        return next(_anew(loader))
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        _anew(dataset)
        alone = DataLoader(dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
        return next(iter(alone))
    if loader.batch_sampler is None:
        first: Any = dataset[next(iter(loader.sampler))]
        return loader.collate_fn(first)
    sampler = loader.batch_sampler
    size = getattr(sampler, "rows_per_step", None) or getattr(sampler, "batch_size", None) or 2
    size = max(size, 2)  # the checks compare a batch with a shorter one
    known = rows_at_set_up(loader)
    rows = [int(row) for row in islice(known, start, start + size)]
    fetch = getattr(dataset, "__getitems__", None)
    return loader.collate_fn(fetch(rows) if fetch else [dataset[i] for i in rows])


def _anew(stream: Any) -> Iterator[Any]:
    """Iterate a stream, or refuse one that would lose what is read of it here."""
    iterator: Iterator[Any] = iter(stream)
    if iterator is iter(stream):
        raise ValueError(
            f"{type(stream).__name__} gives the same iterator each time, so that the batch that is "
            "run at set-up would be lost to the training. Let __iter__ start anew, or call "
            "svi.loss(batch) once before the fit, with dataset_size given."
        )
    return iterator


def first_rows(batch: Any, count: int) -> Any:
    """Cut the first rows of every tensor that is indexed by row; leave everything else.

    Example:
        >>> first_rows((torch.zeros(5, 2), "unit"), 2)[0].shape
        torch.Size([2, 2])
    """
    rows = count_rows(batch)

    def cut(value: torch.Tensor) -> torch.Tensor:
        return value[:count].clone() if value.dim() and len(value) == rows else value

    return map_tensors(batch, cut)
