"""Which rows of the data set a batch holds, for guides that keep parameters of each row."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler
from torch.utils.data import default_collate as _default_collate

from pyro_lightning.arguments import read_callable, shortly
from pyro_lightning.retold import retell
from pyro_lightning.sources import source_of

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class IndexedBatch(NamedTuple):
    """A batch with the numbers of its rows; the model sees ``data`` alone.

    Attributes:
        data: The batch as the model knows it.
        rows: Number of each row in the data set, ``(B,)`` integers.
        source: Which data set the numbers belong to; None is not checked.
    """

    data: Any
    rows: Any
    source: Any = None


class ChosenBatch(IndexedBatch):
    """A batch whose row numbers were chosen without looking at its data."""


class IndexedDataset(Dataset[Any]):
    """A map-style data set whose batches tell which of its rows they hold.

    :class:`PyroSVIModule` needs the numbers where an autoguide has latents of each row. A row keeps
    its number whatever comes around this data set: ``random_split``, ``Subset``, shuffling,
    workers, a ``DistributedSampler``. Split what this class wraps into training and validation, or
    wrap the training part alone. Wrapping the same data set again gives the same numbers; keep it,
    where loaders are made in hooks, rather than make it anew.

    Args:
        dataset: The data set, with ``__len__`` and ``__getitem__``.
        collate_fn: What joins its items, where that is not torch's default; then give the loader
            ``collate_fn=indexed.collate``.

    Raises:
        TypeError: For an iterable data set, whose rows have no numbers.

    Example:
        >>> data = IndexedDataset(torch.arange(10.0))
        >>> batch = next(iter(DataLoader(data, batch_size=3)))
        >>> batch.data, batch.rows
        (tensor([0., 1., 2.]), tensor([0, 1, 2]))
    """

    row_numbers = True

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None = None) -> None:
        mapped = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        mapped = mapped and getattr(dataset, "shape", None) != ()
        if isinstance(dataset, IterableDataset | type | Mapping | str | bytes) or not mapped:
            raise TypeError(
                f"the rows of a {type(dataset).__name__} have no numbers: expected a map-style "
                "data set, with __len__ and __getitem__"
            )
        self.dataset = dataset
        self.collate_fn = read_callable(collate_fn, "collate_fn", "what joins a list of items")
        # Of the data set itself: wrapped anew, as hooks that make loaders do, it is no other.
        self.source = source_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def identities(self) -> int:
        """How many rows have a number."""
        return len(self)

    def __getitem__(self, index: int) -> IndexedBatch:
        number = self._number(index)
        return IndexedBatch(self._item(number), number, self.source)

    def _item(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except Exception as error:
            retell(error, f"row {number} of the data set")

    def _number(self, index: int) -> int:
        try:
            number = operator.index(index)
        except TypeError:
            raise TypeError(
                f"the index of a row must be an integer, got {shortly(index)}"
            ) from None
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} is out of range: the data set has {len(self)} rows")
        return number + len(self) if number < 0 else number

    def __getitems__(self, indices: Sequence[int]) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        numbers = [self._number(index) for index in indices]
        try:
            items = fetch(indices) if fetch else None
        except Exception as error:
            retell(error, f"rows {shown(numbers)} of the data set")
        items = [self._item(number) for number in numbers] if items is None else items
        if isinstance(items, list) and len(items) == len(indices):
            return [IndexedBatch(*pair, self.source) for pair in zip(items, numbers, strict=True)]
        return IndexedBatch(items, torch.as_tensor(numbers), self.source)

    def collate(self, items: list[IndexedBatch]) -> IndexedBatch:
        """Join items by the ``collate_fn`` of this data set, and their numbers."""
        data = (self.collate_fn or _default_collate)([item.data for item in items])
        return IndexedBatch(data, torch.tensor([int(item.rows) for item in items]), self.source)


def data_of(batch: Any) -> Any:
    """Return what the model sees of a batch."""
    return batch.data if isinstance(batch, IndexedBatch) else batch


def shown(numbers: list[int], most: int = 10) -> str:
    """List numbers, many of them shortened.

    Example:
        >>> shown([4, 5, 6]), shown([7]), shown([3, 9, 1]), shown([0, 2, 5], most=2)
        ('4 to 6', '7', '3, 9, 1', '0, 2 and 1 more')
    """
    first, count = numbers[0], len(numbers)
    if count > 2 and numbers == list(range(first, first + count)):
        return f"{first} to {first + count - 1}"
    more = f" and {count - most} more" if count > most else ""
    return ", ".join(map(str, numbers[:most])) + more


class RowSource(NamedTuple):
    """Where row numbers come from: the data set, how many rows have one, and those that train."""

    dataset: Any
    identities: int
    trained: torch.Tensor | None


def row_source(loader: Any) -> RowSource | None:
    """Find the data set that numbers the rows of a training loader, or could.

    ``Subset``s are looked through; ``trained`` marks the rows that are left, None for all of them.

    Example:
        >>> data = IndexedDataset(torch.zeros(5))
        >>> row_source(DataLoader(Subset(data, [1, 3]))).trained
        tensor([False,  True, False,  True, False])
    """
    if not isinstance(loader, DataLoader):
        return None
    dataset: Any = loader.dataset
    kept: Any = None
    if isinstance(loader.sampler, SubsetRandomSampler):
        kept = torch.as_tensor(loader.sampler.indices)
    while isinstance(dataset, Subset):
        indices = torch.as_tensor(dataset.indices)
        kept = indices if kept is None else indices[kept]
        dataset = dataset.dataset
    if not hasattr(dataset, "row_numbers"):
        return None
    own: Any = getattr(dataset, "rows", None)
    if kept is None and hasattr(own, "mask"):
        return RowSource(dataset, dataset.identities, own.mask())
    if own is not None:
        own = torch.as_tensor(np.asarray(own))
        kept = own if kept is None else own[kept]
    trained = None
    if kept is not None:
        trained = torch.zeros(dataset.identities, dtype=torch.bool)
        trained[kept] = True
    return RowSource(dataset, dataset.identities, trained)


def checked_rows(batch: Any, batch_size: int, identities: int, source: Any) -> torch.Tensor | None:
    """Return the row numbers of a batch, or None where it has none.

    Args:
        batch: A batch.
        batch_size: B.
        identities: How many rows have parameters.
        source: The data set that the parameters belong to; None is not checked.

    Raises:
        ValueError: When the numbers are not B integers in ``[0, identities)``, or belong to
            another data set.
    """
    if not isinstance(batch, IndexedBatch):
        return None
    try:
        rows = torch.as_tensor(batch.rows)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"row numbers must be B = {batch_size} integers, got {shortly(batch.rows)}"
        ) from error
    if rows.shape != (batch_size,) or rows.dtype not in _INTEGERS:
        raise ValueError(
            f"row numbers must be B = {batch_size} integers, got a tensor of shape "
            f"{tuple(rows.shape)} and {rows.dtype}"
        )
    if source is not None and batch.source is not None:
        # The same for a whole batch, or one for each row after torch's default collation.
        if (torch.as_tensor(batch.source) != source).any():
            raise ValueError(
                "the row numbers of this batch belong to another data set than the one whose rows "
                "the guide has parameters for. Split one IndexedDataset into training and "
                "validation, or leave the validation data unwrapped: their rows are then unseen. "
                "Where hooks make the loaders, wrap a data set that is made once."
            )
    low, high = (int(bound) for bound in torch.aminmax(rows))
    if low < 0 or high >= identities:
        raise ValueError(
            f"row numbers {low} to {high} are out of range: the guide has parameters for rows 0 to "
            f"{identities - 1}. Number the rows of the training set, whose size is N, from 0."
        )
    return rows.long()


def asked_rows(rows: Any, identities: int) -> torch.Tensor:
    """Return the row numbers that a user asks for, ``(len(rows),)``, on the CPU.

    Args:
        rows: Integers in a sequence, array or tensor; a slice; or a mask, one bool for each row.
        identities: How many rows there are.

    Raises:
        ValueError: When there is none, or when they are no numbers of rows.

    Example:
        >>> asked_rows(slice(0, 6, 2), 5)
        tensor([0, 2, 4])
    """
    try:
        if isinstance(rows, slice):
            numbers = torch.tensor(range(identities)[rows], dtype=torch.long)
        else:
            numbers = torch.as_tensor(rows).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            "rows must be a sequence of integers, a slice, or a mask of one bool for each of "
            f"{identities} rows; got {shortly(rows)}"
        ) from error
    if numbers.dtype == torch.bool and numbers.shape == (identities,):
        numbers = numbers.nonzero().flatten()
    if not numbers.numel():
        raise ValueError("rows is empty: name at least one row")
    if numbers.dim() != 1 or numbers.dtype not in _INTEGERS:
        raise ValueError(
            "rows must be a sequence of integers, a slice, or a mask of one bool for each of "
            f"{identities} rows; got a tensor of shape {tuple(numbers.shape)} and {numbers.dtype}"
        )
    checked: torch.Tensor | None = checked_rows(
        IndexedBatch(None, numbers), len(numbers), identities, None
    )
    assert checked is not None  # it is an IndexedBatch
    return checked
