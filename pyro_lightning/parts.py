"""The mini-batches that a batch of the loader is cut into, with `steps_per_batch`."""

from typing import Any

import torch

from pyro_lightning.batches import cut_batch
from pyro_lightning.rows import IndexedBatch, data_of


class Parts:
    """The mini-batches of successive rows in a batch; the last may be smaller.

    Args:
        batch: A batch, with or without row numbers.
        rows: Rows of the batch.
        size: Rows of a mini-batch.

    Example:
        >>> [part["x"].tolist() for part in Parts({"x": torch.arange(5)}, rows=5, size=2)]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, batch: Any, rows: int, size: int) -> None:
        self.batch, self.rows, self.size = batch, rows, size
        self._repeats: bool | None = None

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def rows_of(self, number: int) -> int:
        """Count the rows of a mini-batch."""
        return min(self.size, self.rows - number * self.size)

    def data_of(self, number: int) -> Any:
        """Return a mini-batch without its row numbers."""
        return data_of(self[number])

    def repeats(self, number: int) -> bool:
        """Whether a mini-batch holds a row twice; looked at one by one only if the batch does."""
        if self._repeats is None:
            self._repeats = has_repeats(self.batch)
        return self._repeats and has_repeats(self[number])

    def __getitem__(self, number: int) -> Any:
        if number >= len(self):
            raise IndexError(number)
        start = number * self.size
        return cut_batch(self.batch, self.rows, start, start + self.rows_of(number))


def has_repeats(batch: Any) -> bool:
    """Whether a row of parameters of its own comes twice in a batch: its gradients add up."""
    if not isinstance(batch, IndexedBatch):
        return False
    rows = torch.as_tensor(batch.rows)
    return len(torch.unique(rows)) < len(rows)
