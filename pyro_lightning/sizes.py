"""N, and the mean batch size, read from a training loader."""

import math
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_lightning.arguments import read_count, read_number
from pyro_lightning.padding import share_of
from pyro_lightning.rank_zero import warn
from pyro_lightning.streams import STATE_IT, stream_size


def row_sampler(loader: DataLoader[Any]) -> Any:
    """Return what orders the rows of a loader."""
    sampler: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    while isinstance(inner := getattr(sampler, "sampler", None), object) and inner is not None:
        sampler = inner  # BatchSampler and Lightning's wrappers keep the row sampler in `sampler`
    return sampler


def knows_of_ranks(loader: Any) -> bool:
    """Whether what orders a loader's rows gives each of several processes its share."""
    return isinstance(loader, DataLoader) and hasattr(row_sampler(loader), "num_replicas")


def dataset_size_of(loader: Any) -> int:
    """Read N, the number of observations in the training set, from its loader.

    N is the whole set's: a rank's share of a ``DistributedSampler`` and rows that ``drop_last``
    leaves out count; rows of the parent outside a ``Subset`` or ``SubsetRandomSampler`` do not. Of
    iterable data sets litdata's ``StreamingDataset`` tells it.

    Raises:
        ValueError: When N cannot be known: another iterable data set, several loaders, no
            DataLoader, batches made by the data set itself, or a sampler that visits another
            number of rows.

    Example:
        >>> dataset_size_of(DataLoader(range(10), batch_size=4, shuffle=True, drop_last=True))
        10
    """
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"N cannot be read from a {type(loader).__name__}; expected one DataLoader. {STATE_IT}"
        )
    if isinstance(loader.dataset, IterableDataset):
        return stream_size(loader)
    if loader.batch_sampler is None and not isinstance(loader.sampler, BatchSampler):
        raise ValueError(
            "the loader has batch_size=None, so that an item of its data set is a batch and N "
            f"cannot be counted. {STATE_IT}"
        )
    sampler = row_sampler(loader)
    if isinstance(sampler, WeightedRandomSampler) or getattr(sampler, "replacement", False):
        warn(
            f"{type(sampler).__name__} with weights or replacement changes how often a row is "
            "seen: the fit is to the distribution it draws from, not to the data set.",
            stacklevel=2,
        )
    elif isinstance(sampler, SubsetRandomSampler):
        return len(sampler.indices)
    elif not isinstance(
        sampler, DistributedSampler | RandomSampler | SequentialSampler
    ) and not hasattr(sampler, "num_replicas"):
        visited = len(sampler) if hasattr(sampler, "__len__") else None
        batches = loader.batch_sampler
        if not isinstance(batches, BatchSampler):
            visited = None
        if isinstance(batches, list | tuple):
            visited = len({int(row) for batch in batches for row in batch})
        if visited != len(loader.dataset):  # type: ignore[arg-type]
            raise ValueError(
                f"the sampler {type(sampler).__name__} visits {visited} of "
                f"{len(loader.dataset)} rows, so N is unclear. {STATE_IT}"  # type: ignore[arg-type]
            )
    elif isinstance(sampler, SequentialSampler) and loader.drop_last:
        left = len(loader.dataset) % (loader.batch_size or 1)  # type: ignore[arg-type]
        if left:
            warn(
                f"drop_last without shuffling leaves the same last {left} rows out of every epoch, "
                "though N counts them: shuffle, or leave drop_last out.",
                stacklevel=2,
            )
    return len(loader.dataset)  # type: ignore[arg-type]


def refuse_no_batch(loader: Any) -> None:
    """Refuse a training loader without a batch, of which Lightning warns, and trains nothing.

    Raises:
        ValueError: Saying how many rows there are, and for what they are too few.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    batches: Any = loader.batch_sampler
    if batches is None or not hasattr(batches, "__len__") or len(batches):
        return
    size, last = getattr(batches, "batch_size", None), getattr(batches, "drop_last", False)
    dropped = f", and drop_last leaves out a batch of fewer than batch_size={size}" if last else ""
    raise ValueError(
        f"the training loader has no batch: its data set has {len(loader.dataset)} rows{dropped}"  # type: ignore[arg-type]
    )


def mean_batch_size(loader: Any, num_batches: float) -> float | None:
    r"""Rows a batch holds on average over an epoch, or None where that cannot be known.

    Over the batches of all R ranks, without the rows that a ``DistributedSampler`` repeats to give
    each rank equally many:

    .. math:: \bar B = N / (R M)

    Args:
        loader: The training loader, of one rank.
        num_batches: M, the batches of a rank's epoch; fewer than the loader's when it is cut short,
            and N then the rows that are left.

    Example:
        >>> mean_batch_size(DataLoader(range(101), batch_size=100), 2)
        50.5
        >>> share = DistributedSampler(range(101), num_replicas=2, rank=0)
        >>> mean_batch_size(DataLoader(range(101), batch_size=51, sampler=share), 1)
        50.5
    """
    num_batches = read_number(num_batches, "num_batches", finite=False)
    share = share_of(loader, num_batches) if num_batches else None
    if share is None or not share.of_rows:
        return None
    return share.everyone / (share.ranks * num_batches)


def cut_sizes(loader: Any, num_batches: float, rows: int, steps: int) -> tuple[int, float | None]:
    """Rows of a mini-batch, and their mean, where each batch of a loader is cut into several.

    Args:
        loader: The training loader, of one rank.
        num_batches: Its batches of an epoch.
        rows: Rows of its first batch, which count where it does not say how many it makes.
        steps: How many mini-batches a full batch holds.

    Raises:
        ValueError: When they do not divide a full batch, or when ranks share out batches.

    Example:
        >>> cut_sizes(DataLoader(range(11), batch_size=4), 3, 4, 2)  # 2, 2, 2, 2, 2, 1
        (2, 1.8333333333333333)
    """
    sampler = getattr(loader, "batch_sampler", None)
    whole = getattr(sampler, "batch_size", None) or rows
    if whole % steps:
        raise ValueError(
            f"steps_per_batch={steps} does not divide the {whole} rows of a batch of the loader. "
            "Let the loader hand over K * B rows for K steps of B; ArrayDataModule does it itself."
        )
    share = share_of(loader, num_batches)
    if share is not None and not share.of_rows and share.ranks > 1:
        raise ValueError(
            f"steps_per_batch={steps} on several ranks needs a loader that tells how many rows its "
            "batches hold: a rank whose batch holds fewer takes fewer steps, and others would wait "
            "for it for ever. Give the BatchSampler to the loader as batch_sampler, not as sampler "
            "with batch_size=None."
        )
    if share is None or not share.of_rows:
        return whole // steps, None
    # A rank takes a step for a repeated row, too, for which another rank has a row.
    taken = math.ceil(share.items / (whole // steps))
    return whole // steps, share.everyone / (share.ranks * taken)


def batch_weight(batch_size: int, mean_batch_size: float | None) -> float:
    r"""Weight of a batch's loss, so that every observation weighs the same over an epoch.

    .. math:: w_b = B_b M / \sum_{b'=1}^{M} B_{b'}

    The M batches are those of all ranks. The mean over an epoch of :math:`w_b` times the loss at
    scale :math:`N / B_b` is then the loss of the full data; equal batches get exactly 1.

    Raises:
        TypeError: For what is no number.
        ValueError: For a batch size below 1, or a mean that is not above 0.

    Example:
        >>> batch_weight(100, 50.5) * 101 / 100, batch_weight(1, 50.5) * 101 / 1
        (2.0, 2.0)
    """
    size = read_count(batch_size, "batch_size")
    if mean_batch_size is None:
        return 1.0
    return size / read_number(mean_batch_size, "mean_batch_size", positive=True)
