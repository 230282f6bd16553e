"""Which rows of the data set a batch held, found after the fact for an error to name them."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from pyro_lightning.arrays import ArrayDataset
from pyro_lightning.batches import named_tensors
from pyro_lightning.loader import as_is
from pyro_lightning.rows import IndexedBatch, data_of
from pyro_lightning.samplers import RowBatches

_PLAIN = (ArrayDataset, TensorDataset, torch.Tensor)  # the same rows each time, at little cost


def numbers_of_rows(batch: Any, loader: Any = None, number: int = 0) -> list[int] | None:
    """Find the row numbers of a batch.

    An ``IndexedBatch`` has them. Otherwise they follow from the order of the loader's rows, where
    that can be gone through once more, and are checked by reading the rows again.

    Args:
        batch: The batch, on any device.
        loader: Where it came from.
        number: Which batch of the epoch it was.

    Returns:
        The numbers in the data set, or None where they are not known.

    Example:
        >>> x = torch.arange(10.0)
        >>> numbers_of_rows(x[4:8], DataLoader(x, batch_size=4), 1)
        [4, 5, 6, 7]
    """
    if isinstance(batch, IndexedBatch):
        return _as_list(batch.rows)
    places = _places(loader, number)
    if places is None or not _hold(loader, places, data_of(batch)):
        return None
    return _in_parents(loader.dataset, places)


def _as_list(rows: Any) -> list[int] | None:
    try:
        numbers = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        return None  # no numbers at all, as the error that is told says
    return numbers.tolist() if numbers.dim() == 1 else None


def numbers_in_order(loader: Any, number: int) -> list[int] | None:
    """Find the row numbers of a batch that could not be read, in an epoch that was not resumed."""
    places = _places(loader, number)
    return None if places is None else _in_parents(loader.dataset, places)


def _places(loader: Any, number: int) -> Any:
    if not isinstance(loader, DataLoader):
        return None
    batches = loader.batch_sampler
    if isinstance(batches, RowBatches):
        return batches.again(number)
    if type(batches) is not BatchSampler or type(batches.sampler) is not SequentialSampler:
        return None
    start = number * batches.batch_size
    return np.arange(start, min(start + batches.batch_size, len(batches.sampler)))


def _hold(loader: Any, places: Any, data: Any) -> bool:
    """Whether these rows are those of a batch: a resumed epoch may number its batches anew."""
    dataset = loader.dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if not isinstance(dataset, _PLAIN) or loader.collate_fn not in (default_collate, as_is):
        return False  # code of the user's, which may draw random numbers
    fetch = getattr(loader.dataset, "__getitems__", None)
    items = fetch(places) if fetch else [loader.dataset[int(place)] for place in places]
    again = data_of(loader.collate_fn(items))
    pairs = zip(named_tensors(again, ""), named_tensors(data, ""), strict=False)
    return all(
        one.shape == other.shape
        and bool(torch.isclose(one.cpu().to(other.dtype), other.cpu(), 0, 0, equal_nan=True).all())
        for (_, one), (_, other) in pairs
    )


def _in_parents(dataset: Any, places: Any) -> list[int]:
    while isinstance(dataset, Subset):
        places = np.asarray(dataset.indices)[places]
        dataset = dataset.dataset
    own = getattr(dataset, "rows", None)
    if isinstance(dataset, ArrayDataset) and own is not None:
        places = own[places]
    numbers: list[int] = places.tolist()
    return numbers
