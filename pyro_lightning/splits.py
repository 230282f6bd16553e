"""Which rows are held out, and which are left to train."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyro_lightning.orders import LARGEST_TABLE, KeyedPermutation, Rows


class RowsWithout:
    """The rows 0 to N - 1 less some of them, in order, found where they are asked for.

    Takes the memory of the rows that are left out, instead of those that are left.

    Args:
        size: N.
        held_out: Distinct rows, in ascending order.

    Example:
        >>> RowsWithout(6, np.array([1, 2, 4]))[np.array([0, 1, 2])]
        array([0, 3, 5])
    """

    def __init__(self, size: int, held_out: Rows) -> None:
        self._length, self._held_out = size - len(held_out), held_out
        # How many rows are left before each that is not: as many as its place among those left.
        self._left_before = held_out - np.arange(len(held_out))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: Any) -> Any:
        return places + np.searchsorted(self._left_before, places, side="right")

    def mask(self) -> torch.Tensor:
        """Mark the rows that are left, ``(N,)``."""
        left = torch.ones(self._length + len(self._held_out), dtype=torch.bool)
        left[torch.from_numpy(self._held_out)] = False
        return left

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.asarray(self[np.arange(len(self))], dtype)


def split_rows(size: int, held_out: Sequence[int], seed: int) -> list[Any]:
    """Choose at random the rows of each part that is held out, and give what is left.

    Args:
        size: N.
        held_out: Rows of each part.
        seed: Equal seeds give equal parts.

    Returns:
        The rows that are left, then those of each part; all ascending.

    Example:
        >>> left, part = split_rows(5, [2], seed=0)
        >>> sorted([*left, *part])
        [np.int64(0), np.int64(1), np.int64(2), np.int64(3), np.int64(4)]
    """
    total = sum(held_out)
    if size <= LARGEST_TABLE:
        order = np.random.default_rng(seed).permutation(size)
        left: Any = np.sort(order[total:])
    else:
        permutation = KeyedPermutation(size, torch.Generator().manual_seed(seed))
        order = permutation(np.arange(total))
        left = RowsWithout(size, np.sort(order))
    return [left, *(np.sort(part) for part in np.split(order[:total], np.cumsum(held_out)[:-1]))]
