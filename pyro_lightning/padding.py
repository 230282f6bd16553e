"""Rows that a distributed sampler repeats, so that all ranks have equally many."""

import math
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from pyro_lightning.samplers import RowBatches


class Share(NamedTuple):
    """What a rank's loader hands on in an epoch.

    Attributes:
        items: How many items: rows, or batches where the sampler hands on batches.
        real: How many of them are no repeats.
        fewest: How many every rank has of those.
        everyone: How many all ranks have of those together.
        ranks: R.
        size: Items of a batch.
        of_rows: Whether an item is a row.
        in_order: Whether batches are cut in the order of the sampler, so that repeats come last.
    """

    items: int
    real: int
    fewest: int
    everyone: int
    ranks: int
    size: int
    of_rows: bool
    in_order: bool

    def may_repeat(self, batch_idx: int) -> bool:
        """Whether a batch of some rank may hold a repeat: the same on all ranks."""
        if self.everyone == self.ranks * self.items:
            return False
        return not self.in_order or min((batch_idx + 1) * self.size, self.items) > self.fewest

    def real_rows(self, batch_idx: int, rows: int) -> int | None:
        """Count the rows of a batch that are no repeats, which stand first in it.

        Args:
            batch_idx: Number of the batch in the epoch.
            rows: B, its rows in all.

        Returns:
            Their number; None where it cannot be told which rows they are.
        """
        if not self.may_repeat(batch_idx):
            return rows
        start = batch_idx * self.size
        made = min(self.size, self.items - start)
        if not self.in_order or (self.of_rows and made != rows):
            return None
        real = max(0, min(self.real - start, made))
        return rows if real == made else real


def share_of(loader: Any, num_batches: float = math.inf, batch_sampler: Any = None) -> Share | None:
    """Tell what a rank's loader hands on; None where that cannot be known.

    A ``DistributedSampler`` gives rank r of R the items r, r + R, r + 2R, ... of an order of N, to
    whose end its first items are added until R divides it. A rank's last item may so be a repeat.

    Args:
        loader: The loader of one rank.
        num_batches: M, the batches of an epoch, where it is cut short.
        batch_sampler: What makes the batches, where the loader's own is a wrapper of it.

    Example:
        >>> sampler = DistributedSampler(range(7), num_replicas=2, rank=1, shuffle=False)
        >>> list(sampler)
        [1, 3, 5, 0]
        >>> share = share_of(DataLoader(range(7), batch_size=3, sampler=sampler))
        >>> share.items, share.everyone, share.real_rows(0, rows=3), share.real_rows(1, rows=1)
        (4, 7, 3, 0)

    Source: ``torch.utils.data.distributed.DistributedSampler``.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    batches: Any = batch_sampler if batch_sampler is not None else loader.batch_sampler
    batches = loader.sampler if batches is None else batches
    size, sampler = getattr(batches, "batch_size", None), getattr(batches, "sampler", None)
    of_rows, in_order = True, type(batches) in (BatchSampler, RowBatches)
    if size is None or sampler is None:
        # Lightning shares out a sampler of whole batches as it does one of rows.
        if not isinstance(batches, DistributedSampler):
            return None
        size, sampler, of_rows, in_order = 1, batches, False, True
    visited = getattr(batches, "num_rows", None) if of_rows else None
    visited = len(sampler) if visited is None else visited
    # Cut short, an epoch holds full batches only; the ragged one comes last.
    items = int(min(visited, num_batches * size))
    if not isinstance(sampler, DistributedSampler) or sampler.total_size <= len(sampler.dataset):  # type: ignore[arg-type]
        ranks = getattr(sampler, "num_replicas", 1)
        return Share(items, items, items, ranks * items, ranks, size, of_rows, in_order)
    ranks, total = sampler.num_replicas, len(sampler.dataset)  # type: ignore[arg-type]
    fewest, more = divmod(total, ranks)  # the first ranks have one more
    everyone = more * min(fewest + 1, items) + (ranks - more) * min(fewest, items)
    real = min(fewest + (sampler.rank < more), items)
    return Share(items, real, min(fewest, items), everyone, ranks, size, of_rows, in_order)
