"""Samplers that hand on rows as arrays, a batch at a time, instead of one Python integer a row."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler

from pyro_lightning.orders import CHUNK, Rows, in_order, shuffled

Order = Callable[[int, torch.Generator], Iterator[Rows]]


class ShuffledRows(RandomSampler):
    """Visits every row once, in a new order each epoch.

    The seed of an epoch's order is one draw of torch's default generator. It is a
    ``RandomSampler``, so that Lightning replaces it by a ``DistributedSampler`` under DDP, where it
    was made without knowing of that.

    Args:
        data_source: The data set.
        order: What makes the order of N rows.
    """

    def __init__(self, data_source: Any, order: Order = shuffled) -> None:
        super().__init__(data_source)
        self.order = order
        self._seed = 0

    def chunks(self) -> Iterator[Rows]:
        """Yield the rows of an epoch, many at a time."""
        self._seed = int(torch.empty((), dtype=torch.int64).random_().item())
        yield from self.chunks_again()

    def chunks_again(self) -> Iterator[Rows]:
        """Yield the rows of the epoch that was begun last."""
        generator = torch.Generator().manual_seed(self._seed)
        yield from self.order(len(self.data_source), generator)

    def __iter__(self) -> Iterator[int]:
        for chunk in self.chunks():
            yield from cast("list[int]", chunk.tolist())


class DistributedRows(DistributedSampler[Any]):
    """A rank's share of an order: rows k, k + R, k + 2R, ... of it for rank k of R.

    As with torch's sampler the first rows of the order come again at its end, so that shares are
    equal, and the order follows from seed and epoch.

    Args:
        dataset: The data set.
        order: What makes the order of N rows.
        num_replicas: R.
        rank: Which share.
        seed: The same on all ranks.
    """

    def __init__(
        self, dataset: Any, order: Order, *, num_replicas: int, rank: int, seed: int = 0
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)
        self.order = order

    def chunks(self) -> Iterator[Rows]:
        """Yield the rows of this rank's epoch, many at a time."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        missing = self.total_size - len(self.dataset)  # type: ignore[arg-type]
        first, seen = np.empty(0, np.int64), 0
        for chunk in self.order(len(self.dataset), generator):  # type: ignore[arg-type]
            if len(first) < missing:
                first = np.concatenate([first, chunk])[:missing]
            yield chunk[(self.rank - seen) % self.num_replicas :: self.num_replicas]
            seen += len(chunk)
        again = np.resize(first, missing)
        yield again[(self.rank - seen) % self.num_replicas :: self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        for chunk in self.chunks():
            yield from cast("list[int]", chunk.tolist())


class RowBatches(BatchSampler):
    """Cuts the rows of a sampler into batches, each an array of integers.

    Args:
        sampler: Gives the rows of an epoch; those of this file in arrays, any other one by one.
        batch_size: Rows of a batch.
        drop_last: Whether rows are left out that fill no step of their own.
        rows_per_step: Rows of an optimizer step, where a batch holds several steps' rows.
        device: Where the arrays of integers are tensors; None for NumPy arrays.

    Example:
        >>> list(RowBatches(SequentialSampler(range(5)), 2, True))
        [array([0, 1]), array([2, 3])]
    """

    def __init__(
        self,
        sampler: Any,
        batch_size: int,
        drop_last: bool,
        rows_per_step: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.rows_per_step = rows_per_step or batch_size
        self.device = device

    @property
    def num_rows(self) -> int:
        """Rows of an epoch, less those that are left out."""
        rows = len(self.sampler)  # type: ignore[arg-type]
        return rows // self.rows_per_step * self.rows_per_step if self.drop_last else rows

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        yield from self._batches(_chunks(self.sampler))

    def again(self, number: int) -> Rows | None:
        """Find the rows of a batch of the epoch that was begun last; None where nothing tells."""
        sampler: Any = self.sampler
        if hasattr(sampler, "chunks_again"):
            chunks = sampler.chunks_again()
        elif isinstance(sampler, DistributedRows) or type(sampler) is SequentialSampler:
            chunks = _chunks(sampler)
        else:
            return None
        rows = next(islice(self._batches(chunks), number, None), None)
        return None if rows is None else np.asarray(torch.as_tensor(rows).cpu())

    def _batches(self, chunks: Iterator[Rows]) -> Iterator[Any]:
        left = self.num_rows
        rest = np.empty(0, np.int64)
        for chunk in chunks:
            rows = np.concatenate([rest, chunk])[:left]
            last = len(rows) == left
            whole = left if last else len(rows) // self.batch_size * self.batch_size
            yield from self._cut(rows[:whole])
            rest, left = rows[whole:], left - whole

    def _cut(self, rows: Rows) -> Iterator[Any]:
        # Arrays rather than tensors: they are small to slice and to send to workers.
        placed: Any = rows
        if self.device is not None:
            placed = torch.from_numpy(rows).to(self.device)
        for start in range(0, len(rows), self.batch_size):
            yield placed[start : start + self.batch_size]


def _chunks(sampler: Any) -> Iterator[Rows]:
    if hasattr(sampler, "chunks"):
        yield from sampler.chunks()
    elif type(sampler) is SequentialSampler:
        yield from in_order(len(sampler))
    elif type(sampler) is DistributedSampler and not sampler.shuffle:
        # What Lightning puts in for a loader in order: its own iteration lists all N rows.
        for chunk in in_order(sampler.num_samples):
            yield (chunk * sampler.num_replicas + sampler.rank) % len(sampler.dataset)  # type: ignore[arg-type]
    else:
        rows = iter(sampler)
        while (chunk := np.fromiter(islice(rows, CHUNK), np.int64)).size:
            yield chunk
