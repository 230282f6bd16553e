"""Rows of arrays as a data set whose batches are cut by one index operation."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, RandomSampler

from pyro_lightning.rows import IndexedBatch
from pyro_lightning.sources import source_of_arrays

Arrays = Any  # a tensor, array or memmap; or a tuple, list or mapping of them


def _named(arrays: Arrays) -> dict[Any, Any]:
    if isinstance(arrays, Mapping):
        return dict(arrays)
    if isinstance(arrays, tuple | list):
        return dict(enumerate(arrays))
    return {0: arrays}


class ArrayDataset(Dataset[Any]):
    """Rows of tensors, NumPy arrays or memmaps; a list of rows is one index operation.

    Args:
        arrays: A tensor, array or memmap, or a tuple or mapping of them, with N rows each.
        rows: Which rows belong to this data set; all of them by default.

    Attributes:
        row_numbers: Whether batches say which rows of the arrays they hold, as ``IndexedBatch``.
        identities: How many rows the arrays have.

    Raises:
        ValueError: When there is no array or no row, or when lengths differ.
        TypeError: When something is not an array of numbers.
    """

    def __init__(self, arrays: Arrays, rows: np.ndarray[Any, Any] | None = None) -> None:
        named = _named(arrays)
        if not named:
            raise ValueError("expected at least one array, got none")
        for name, array in named.items():
            if not isinstance(array, torch.Tensor | np.ndarray):
                raise TypeError(
                    f"array {name!r} must be a tensor or NumPy array, got {type(array).__name__}"
                )
            if isinstance(array, np.ndarray) and array.dtype.kind not in "biufc":
                raise TypeError(
                    f"array {name!r} has dtype {array.dtype}; convert it to numbers first"
                )
            if array.ndim == 0:
                raise ValueError(f"array {name!r} has no row dimension")
        lengths = {name: len(array) for name, array in named.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays must have the same number of rows, got {lengths}")
        self.arrays = arrays
        self.rows = rows
        self.row_numbers = False
        self.identities = next(iter(lengths.values()))
        self._length = self.identities if rows is None else len(rows)
        if self._length == 0:
            raise ValueError("the arrays have no rows")

    @cached_property
    def source(self) -> int:
        """What tells these arrays from others, known when row numbers are first asked for."""
        return source_of_arrays(_named(self.arrays).values())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._numbered(int(index) if self.rows is None else int(self.rows[index]))

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return a whole batch at once; torch's fetcher calls this instead of row by row."""
        wanted = np.asarray(indices)
        return self._numbered(wanted if self.rows is None else self.rows[wanted])

    def _numbered(self, index: Any) -> Any:
        batch = self._cut(index)
        if not self.row_numbers:
            return batch
        # As Python counts, -1 is the last row.
        return IndexedBatch(batch, torch.as_tensor(index) % self.identities, self.source)

    def _cut(self, index: Any) -> Any:
        def take(array: Any) -> torch.Tensor:
            # Fancy indexing copies the rows alone, so a memmap stays on disk. One row is a view.
            if isinstance(array, torch.Tensor):
                rows = array[torch.as_tensor(index)]
                return rows.clone() if isinstance(index, int) else rows
            return torch.as_tensor(
                np.array(array[index]) if isinstance(index, int) else array[index]
            )

        if isinstance(self.arrays, Mapping):
            return {name: take(array) for name, array in self.arrays.items()}
        if isinstance(self.arrays, tuple | list):
            return tuple(take(array) for array in self.arrays)
        return take(self.arrays)


class ShuffledRows(RandomSampler):
    """Visits every row once, in a new order each epoch, as torch's sampler does, in less memory.

    ``RandomSampler`` turns the permutation into one list of N Python integers, about 40 bytes
    each; here it stays a tensor. It is a ``RandomSampler``, so that Lightning replaces it by a
    ``DistributedSampler`` under DDP.
    """

    def __iter__(self) -> Iterator[int]:
        size = len(self.data_source)
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.int32 if size < 2**31 else torch.int64
        order = torch.randperm(size, generator=generator, dtype=dtype)
        for start in range(0, size, 2**16):
            yield from order[start : start + 2**16].tolist()
