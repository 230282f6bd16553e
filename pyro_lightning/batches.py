"""What a batch holds: its rows, and how its elements become arguments."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from pyro_lightning.rows import IndexedBatch, data_of
from pyro_lightning.streams import first_items


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


def rows_at_set_up(loader: Any) -> Any:
    """Return the row numbers of a map-style data set from which a batch can be taken, or None."""
    batches = isinstance(loader, DataLoader) and loader.batch_sampler is not None
    if not batches or isinstance(loader.dataset, IterableDataset):
        return None
    return getattr(loader.sampler, "indices", range(len(loader.dataset)))


def example_batch(loader: Any, start: int = 0) -> Any:
    """Take one batch as a loader would make it, in this process, without moving its sampler.

    A map-style data set, and one of litdata, is asked for its first rows, so that neither the
    sampler's random state nor the loader's workers are touched. Several loaders give a batch of
    each. Anything else is iterated once.

    Args:
        loader: The loader, or several.
        start: Which row of a map-style data set is the first of the batch.

    Raises:
        ValueError: When a stream can be iterated only once, or is empty.
    """
    if isinstance(loader, Mapping):
        return {name: example_batch(each) for name, each in loader.items()}
    if isinstance(loader, tuple | list):
        return [example_batch(each) for each in loader]
    if not isinstance(loader, DataLoader):
        return _first(_anew(loader))
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset):
        items = first_items(dataset, max(loader.batch_size or 2, 2))
        if items is not None:
            return loader.collate_fn(items if loader.batch_size else items[0])
        _anew(dataset)
        alone = DataLoader(dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn)
        return _first(iter(alone))
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


def _first(batches: Iterator[Any]) -> Any:
    for batch in batches:
        return batch
    raise ValueError("the loader has no batch: expected at least one to train or evaluate on")


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


def cut_batch(batch: Any, rows: int, start: int, stop: int) -> Any:
    """Cut rows out of every tensor that is indexed by row, the row numbers among them.

    Args:
        batch: A batch, with or without row numbers.
        rows: B, its rows.
        start: The first row to keep.
        stop: The row after the last one.

    Example:
        >>> cut_batch(IndexedBatch(torch.zeros(5, 2), torch.arange(5)), 5, 1, 3).rows
        tensor([1, 2])
    """

    def taken(value: torch.Tensor) -> torch.Tensor:
        return value[start:stop] if value.dim() and len(value) == rows else value

    part = map_tensors(data_of(batch), taken)
    if not isinstance(batch, IndexedBatch):
        return part
    source = batch.source
    if isinstance(source, torch.Tensor):
        source = taken(source)
    return type(batch)(part, taken(torch.as_tensor(batch.rows)), source)


def first_rows(batch: Any, count: int) -> Any:
    """Cut the first rows of what is indexed by row, tensors and lists; leave everything else.

    Example:
        >>> first_rows({"x": torch.zeros(3), "name": ["a", "b", "c"], "unit": "m"}, 2)
        {'x': tensor([0., 0.]), 'name': ['a', 'b'], 'unit': 'm'}
    """
    return _taken(batch, list(range(min(count, count_rows(batch)))))


def repeated_rows(batch: Any, count: int) -> Any:
    """Repeat the rows of a batch, in their order, until there are as many as asked for.

    Example:
        >>> repeated_rows((torch.tensor([5, 6]), "unit"), 5)
        (tensor([5, 6, 5, 6, 5]), 'unit')
    """
    rows = count_rows(batch)
    return _taken(batch, [number % rows for number in range(count)])


def _taken(batch: Any, at: list[int]) -> Any:
    rows, numbers = count_rows(batch), torch.tensor(at, dtype=torch.long)

    def taken(value: Any, inside: bool = True) -> Any:
        if isinstance(value, torch.Tensor):
            by_row = value.dim() > 0 and len(value) == rows
            return value.index_select(0, numbers.to(value.device)) if by_row else value
        if isinstance(value, Mapping):
            return {key: taken(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            # torch's collation makes a list of the strings of all rows.
            if (
                inside
                and len(value) == rows
                and all(isinstance(item, str | bytes) for item in value)
            ):
                return [value[number] for number in at]
            values = [taken(item) for item in value]
            return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
        return value

    return taken(batch, inside=False)
