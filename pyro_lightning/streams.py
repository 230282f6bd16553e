"""What a data set of litdata tells of itself: N, rows by their number, which rank it feeds.

litdata is found among the modules that the user has imported, and never imported here.
"""

import copy
import sys
from itertools import pairwise
from typing import Any

from pyro_lightning.loader_lists import each_loader
from pyro_lightning.rank_zero import warn

STATE_IT = "State it: PyroSVIModule(..., dataset_size=N), or a dataset_size on the datamodule."


def _is_litdata(part: Any, name: str = "StreamingDataset") -> bool:
    kind = getattr(sys.modules.get("litdata"), name, None)
    return kind is not None and isinstance(part, kind)


def _fresh(dataset: Any) -> Any:
    """A data set of the same rows that shares no reader and no place in the epoch with this one."""
    alone = copy.copy(dataset)
    alone.reset()
    return alone


def stream_size(loader: Any) -> int:
    """Read N, the items of the whole data set, from a loader of an iterable data set.

    litdata's ``StreamingDataset`` lists the rows that it reads of each chunk: those that
    ``subsample``, ``subset`` and ``train_test_split`` leave. Its ``len`` is no N: it is one rank's
    share, without what ``drop_last`` leaves out.

    Raises:
        ValueError: For any other iterable data set; for a ``StreamingDataset`` that makes its own
            items, or holds a row more than once; for items that are batches.
    """
    dataset = loader.dataset
    if not _is_litdata(dataset):
        raise ValueError(
            f"N cannot be read from an iterable data set ({type(dataset).__name__}). {STATE_IT}"
        )
    name, base = type(dataset).__name__, sys.modules["litdata"].StreamingDataset
    if loader.batch_size is None:
        raise ValueError(
            f"the loader has batch_size=None, so that an item of the {name} is a batch and N "
            f"cannot be counted. {STATE_IT}"
        )
    if type(dataset).__iter__ is not base.__iter__ or type(dataset).__next__ is not base.__next__:
        raise ValueError(
            f"{name} has an __iter__ or __next__ of its own, so that its items need not be the "
            f"rows that are written, and N is unclear. {STATE_IT}"
        )
    parts = sorted(zip(dataset.subsampled_files, dataset.region_of_interest, strict=True))
    for (file, (_, end)), (other, (start, _)) in pairwise(parts):
        if file == other and start < end:
            raise ValueError(
                f"the {name} holds rows more than once (subsample above 1, or a subset that "
                f"repeats rows), so that N is unclear. {STATE_IT}"
            )
    size = int(sum(end - start for _, (start, end) in parts))
    _warn_of_rows_left_out(loader, size)
    return size


def _warn_of_rows_left_out(loader: Any, size: int) -> None:
    dataset = loader.dataset
    # On parallel file systems litdata gives a rank the same chunks in every epoch.
    fixed = getattr(getattr(dataset, "posix_fast", None), "window_shuffle", False)
    if not dataset.drop_last or (dataset.shuffle and not fixed):
        return
    share = _fresh(dataset).get_len(loader.num_workers, loader.batch_size)
    left = size - share * dataset.distributed_env.world_size
    if left > 0:
        warn(
            f"litdata leaves the same {left} of {size} rows out of every epoch, though N counts "
            "them, so that all ranks get equal batches (drop_last, which it sets where there are "
            "several processes): shuffle, or write a number of rows that batch size times "
            "processes divides.",
            stacklevel=4,
        )


def first_items(dataset: Any, count: int) -> list[Any] | None:
    """Take the first items of a data set of litdata by their number; None of any other.

    ``StreamingDataset`` is its own iterator: iterated here, it would start its reader and lose its
    place.
    """
    if not _is_litdata(dataset):
        return None
    alone = _fresh(dataset)
    known = sum(end - start for start, end in dataset.region_of_interest)
    return [alone[index] for index in range(min(count, int(known)))]


def check_shares(loaders: Any, world_size: int, rank: int) -> None:
    """Refuse a data set of litdata that was made before the processes of the training.

    It looks for its rank and their number when it is made. Before ``Trainer.fit`` it finds rank 0
    in each process, so that some rows train several times an epoch and others less.

    Args:
        loaders: The loader, or several.
        world_size: How many processes there are.
        rank: Which of them this one is.

    Raises:
        ValueError: When it takes itself for another rank, or for one of another number.
    """
    for loader in each_loader(loaders):
        dataset = getattr(loader, "dataset", None)
        if not _is_litdata(dataset):
            continue
        found = dataset.distributed_env  # type: ignore[union-attr]
        if (found.world_size, found.global_rank) != (world_size, rank):
            raise ValueError(
                f"this {type(dataset).__name__} was made where there were other processes: it "
                f"takes itself for rank {found.global_rank} of {found.world_size}, but this is "
                f"rank {rank} of {world_size}, so that rows would train too often or never. Make "
                "it in setup() or train_dataloader() of a LightningDataModule, where the processes "
                "are there."
            )


def resume_once(loaders: Any) -> None:
    """Let loaders of litdata that went on from a checkpoint begin the next epoch anew.

    They go on from there in every epoch, until the iterator of one is asked for more than its last
    batch: Lightning, which knows how many there are, does not ask. Rows before the checkpoint would
    train no more. For the first step: by then the iterator is made.
    """
    for loader in each_loader(loaders):
        if _is_litdata(loader, "StreamingDataLoader"):
            loader.restore = False
