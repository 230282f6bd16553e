"""Rows of arrays as a data set whose batches are cut by one index operation an array."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from pyro_lightning.array_files import opened
from pyro_lightning.batches import map_tensors
from pyro_lightning.rows import IndexedBatch
from pyro_lightning.sources import source_of_arrays

Arrays = Any  # a tensor, array, memmap or path; or a tuple, list or mapping of them

_NOT_INDEXED = "uint16", "uint32", "uint64"
_COPIED_AT_ONCE = 2**24  # bytes that go to a device at once, so that a memmap is not loaded whole


def _named(arrays: Arrays) -> dict[Any, Any]:
    if isinstance(arrays, Mapping):
        return dict(arrays)
    if isinstance(arrays, tuple | list):
        return dict(enumerate(arrays))
    return {0: arrays}


class Columns:
    """Arrays with the same number of rows, and how rows of them become a batch.

    Args:
        arrays: A tensor, array or memmap, or a tuple or mapping of them, with N rows each; or
            paths of files, as :func:`pyro_lightning.array_files.opened` reads them.

    Attributes:
        device: Where copies of the arrays are kept; None for where the arrays are.

    Raises:
        ValueError: When there is no array or no row, or when lengths differ.
        TypeError: When something is not an array of numbers.
    """

    device: torch.device | None
    _readers: list[Callable[[Any], torch.Tensor]]

    def __init__(self, arrays: Arrays) -> None:
        arrays = opened(arrays)
        named = _named(arrays)
        if not named:
            raise ValueError("expected at least one array in arrays, got none")
        for name, array in named.items():
            if not isinstance(array, torch.Tensor | np.ndarray):
                raise TypeError(
                    f"array {name!r} must be a tensor or NumPy array, got {type(array).__name__}"
                )
            if isinstance(array, np.ndarray) and array.dtype.kind not in "biufc":
                raise TypeError(
                    f"array {name!r} has dtype {array.dtype}; convert it to numbers first"
                )
            if isinstance(array, np.ma.MaskedArray):
                raise TypeError(
                    f"array {name!r} is masked, and a batch would hold what is under the mask: "
                    "leave these rows out, or hand the mask over as another array"
                )
            strided = not isinstance(array, torch.Tensor) or array.layout == torch.strided
            if not strided or getattr(array, "is_meta", False):
                raise TypeError(f"array {name!r} is sparse or has no data; expected a dense tensor")
            if array.ndim == 0:
                raise ValueError(f"array {name!r} has no row dimension")
        lengths = {name: len(array) for name, array in named.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"arrays must have the same number of rows, got {lengths}")
        self.arrays = arrays
        self._length = next(iter(lengths.values()))
        if not self._length:
            raise ValueError("the arrays have no rows")
        self.release()

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(int(array.nbytes) for array in _named(self.arrays).values())

    def cut(self, rows: Any) -> Any:
        """Return rows, ``(B,)`` integers, as tensors that share no memory with the arrays."""
        if self.device is not None:
            rows = torch.as_tensor(rows, device=self.device)
        elif isinstance(rows, torch.Tensor):
            rows = rows.cpu().numpy()
        return self._joined([reader(rows) for reader in self._readers])

    @property
    def unindexed(self) -> dict[Any, str]:
        """Types of arrays of which torch cannot cut rows, by name."""
        types = {name: str(array.dtype) for name, array in _named(self.arrays).items()}
        return {name: kind for name, kind in types.items() if kind.endswith(_NOT_INDEXED)}

    def keep_on(self, device: torch.device) -> None:
        """Copy the arrays to a device, and cut batches there from now on.

        Raises:
            TypeError: For arrays that torch cannot index.
        """
        if device == self.device:
            return
        for name, kind in self.unindexed.items():
            raise TypeError(
                f"array {name!r} has dtype {kind}, of which torch cannot cut rows on {device}; "
                "convert it to another, or leave out device"
            )
        kept = [_copied(array, device) for array in _named(self.arrays).values()]
        self._readers = [partial(torch.Tensor.index_select, tensor, 0) for tensor in kept]
        self.device = device

    def release(self) -> None:
        """Cut batches from the arrays again; what was copied to a device is given up."""
        self.device = None
        self._readers = [_reader(array) for array in _named(self.arrays).values()]

    def _joined(self, columns: list[torch.Tensor]) -> Any:
        if isinstance(self.arrays, Mapping):
            return dict(zip(self.arrays, columns, strict=True))
        return tuple(columns) if isinstance(self.arrays, tuple | list) else columns[0]

    def __getstate__(self) -> dict[str, Any]:
        # What reads an array refers to its memory once more, which would be pickled twice.
        return {"arrays": self.arrays, "_length": self._length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.release()


def _reader(array: Any) -> Callable[[Any], torch.Tensor]:
    """Choose the fastest way to read rows; all of them copy these rows alone."""
    if isinstance(array, torch.Tensor):
        if not _is_numpys(array):
            return lambda rows: array[torch.from_numpy(rows)]
        array = array.numpy()
    elif type(array) is np.memmap:
        array = array.view(np.ndarray)  # its own indexing makes a memmap of every batch
    # `take` is twice as fast as an index, but first copies all of what is not laid out in rows.
    if type(array) is np.ndarray and array.flags.c_contiguous and array.flags.aligned:
        return lambda rows: torch.from_numpy(array.take(rows, 0))
    return lambda rows: torch.from_numpy(np.asarray(array[rows]))


def _is_numpys(tensor: torch.Tensor) -> bool:
    """Whether NumPy can read the memory of a tensor as it is."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
        and tensor.dtype in _NUMPY_DTYPES
    )


_NUMPY_DTYPES = {
    torch.bool,
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}


def _copied(array: Any, device: torch.device) -> torch.Tensor:
    """Copy an array to a device, part by part."""
    if isinstance(array, torch.Tensor):
        return array.detach().to(device)
    rows = max(1, _COPIED_AT_ONCE * len(array) // max(array.nbytes, 1))
    first = torch.from_numpy(np.array(array[:1]))
    kept = torch.empty(array.shape, dtype=first.dtype, device=device)
    for start in range(0, len(array), rows):
        kept[start : start + rows] = torch.from_numpy(np.array(array[start : start + rows]))
    return kept


class ArrayDataset(Dataset[Any]):
    """Rows of tensors, NumPy arrays or memmaps; a batch of rows is one index operation an array.

    Args:
        arrays: A tensor, array or memmap, or a tuple or mapping of them, with N rows each; or the
            ``Columns`` that several data sets share.
        rows: Which rows belong to this data set, an array or ``RowsWithout``; all by default.

    Attributes:
        row_numbers: Whether batches say which rows of the arrays they hold, as ``IndexedBatch``.
        identities: How many rows the arrays have.

    Raises:
        ValueError: When there is no array or no row, or when lengths differ.
        TypeError: When something is not an array of numbers.
    """

    def __init__(self, arrays: Arrays, rows: Any = None) -> None:
        self.columns = arrays if isinstance(arrays, Columns) else Columns(arrays)
        self.rows = rows
        self.row_numbers = False
        self.identities = len(self.columns)
        self._length = self.identities if rows is None else len(rows)
        if self._length == 0:
            raise ValueError("the arrays have no rows")
        self._rows_there: torch.Tensor | None = None

    @cached_property
    def source(self) -> int:
        """What tells these arrays from others, known when row numbers are first asked for."""
        return source_of_arrays(_named(self.columns.arrays).values())

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        row = int(index) if self.rows is None else int(self.rows[index])
        batch = self.columns.cut(np.array([row]))
        item = map_tensors(batch, lambda column: column[0])
        if not self.row_numbers:
            return item
        return IndexedBatch(item, torch.as_tensor(row % self.identities), self.source)

    def __getitems__(self, indices: Sequence[int] | np.ndarray[Any, Any] | torch.Tensor) -> Any:
        """Return a whole batch at once; torch's fetcher calls this instead of row by row."""
        wanted: Any = indices
        if not isinstance(indices, np.ndarray | torch.Tensor):
            wanted = np.asarray(indices)
        if self.rows is not None:
            wanted = self._parents(wanted)
        batch = self.columns.cut(wanted)
        if not self.row_numbers:
            return batch
        # As Python counts, -1 is the last row.
        return IndexedBatch(batch, torch.as_tensor(wanted) % self.identities, self.source)

    def _parents(self, wanted: Any) -> Any:
        """Rows of the arrays; on the device of the numbers, so that none of them is moved."""
        if isinstance(wanted, np.ndarray):
            return self.rows[wanted]
        if self._rows_there is None or self._rows_there.device != wanted.device:
            self._rows_there = torch.as_tensor(np.asarray(self.rows), device=wanted.device)
        return self._rows_there[wanted]


def as_numpy(values: torch.Tensor) -> "np.ndarray[Any, Any]":
    """Return a tensor's values as an array; NumPy has no bfloat16, which becomes float32."""
    values = values.detach().cpu()
    if values.dtype == torch.bfloat16:
        values = values.float()
    array: np.ndarray[Any, Any] = values.numpy()
    return array
