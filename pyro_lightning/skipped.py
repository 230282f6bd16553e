"""Batches that were left out, and the N that is left without them."""

from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_lightning.orders import in_order
from pyro_lightning.sizes import mean_batch_size, row_sampler


class Skipped:
    """Counts the rows of one pass through a loader, and the batches that were left out.

    Attributes:
        seen: Rows that came.
        batches: Batches that were left out.
        rows: Rows of these.
        unusable: How many of these rows can never train.
        first: The cause of the first, or None.
    """

    def __init__(self) -> None:
        self.seen = self.batches = self.rows = self.unusable = 0
        self.first: str | None = None

    def add(self, rows: int, batches: int, unusable: int, cause: str) -> None:
        """Count a batch, or several that were one batch of the loader."""
        self.batches += batches
        self.rows += rows
        self.unusable += unusable
        if self.first is None:
            self.first = cause

    def share(self, rows_of_epoch: float | None = None) -> float:
        """Share of the rows that cannot train: of those that came, or of all of an epoch."""
        return self.unusable / max(self.seen, rows_of_epoch or 0, 1)


def unusable_rows(rows: int, at_fault: list[int] | None, reshuffled: bool) -> int:
    """Count the rows of a batch that was left out which can never train.

    In an order that is new each epoch the others come again in other batches, so that these are the
    rows that are at fault; one, if none is known. In any other order they come together each time.

    Args:
        rows: B.
        at_fault: The rows that make the loss not finite, where they stand out.
        reshuffled: Whether the order is new each epoch.
    """
    return (len(at_fault) if at_fault else 1) if reshuffled else rows


def size_without(dataset_size: int, share: float) -> int:
    r"""Return N without the rows that cannot train.

    With U the rows that can, a batch that is taken is a sample of U, so that

    .. math:: \frac{N}{B} \sum_{i \in \text{batch}} \log p(x_i) \quad\text{estimates}\quad
        \frac{N}{|U|} \sum_{i \in U} \log p(x_i)

    and the posterior is that of the rows in U where :math:`N = |U|`: the N that was, less the
    share of the rows that cannot train.

    Example:
        >>> size_without(1000, 0.003)
        997
    """
    return max(1, round(dataset_size * (1 - share)))


def is_reshuffled(loader: Any) -> bool:
    """Whether a loader goes through its rows in a new order each epoch.

    Example:
        >>> is_reshuffled(DataLoader(range(9), shuffle=True)), is_reshuffled(DataLoader(range(9)))
        (True, False)
    """
    if not isinstance(loader, DataLoader):
        return False
    sampler = row_sampler(loader)
    if isinstance(sampler, DistributedSampler):
        return sampler.shuffle and getattr(sampler, "order", None) is not in_order
    return isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)


def rows_of_epoch(loader: Any, num_batches: float) -> float | None:
    """Count the rows of an epoch, of one rank; None where they are not known."""
    mean = mean_batch_size(loader, num_batches)
    return None if mean is None else mean * num_batches


def rows_of_batch(loader: Any, number: int, num_batches: float) -> int:
    """Count the rows that a batch would have had, the last of an epoch among them; 1 if unknown.

    Example:
        >>> [rows_of_batch(DataLoader(range(5), batch_size=2), number, 3) for number in range(3)]
        [2, 2, 1]
    """
    size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or 1
    rows = rows_of_epoch(loader, num_batches)
    return size if rows is None else max(1, min(size, round(rows) - number * size))
