"""Ranks whose loaders hand over other numbers of batches than those of others."""

import math
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset

from pyro_lightning._lightning import end_epoch_here, shorten_epochs
from pyro_lightning.padding import share_of
from pyro_lightning.rank_zero import warn

_GOES_ON, _LAST, _ENDED = 0, 1, 2


class RowsOfRanks(NamedTuple):
    """How many rows of an epoch each rank has, where loaders share nothing out.

    Attributes:
        alike: Whether all are known to have equally many.
        mean: How many on average; None where that is not known, or all are alike.
        most: How many the rank with most has.
    """

    alike: bool = True
    mean: float | None = None
    most: int = 0


class EvenSteps(Callback):
    """Ends an epoch of training on all ranks with the last batch of the one that has fewest.

    A step waits for the gradients of all ranks, for ever if one of them has no batch left. Ranks
    whose loaders are equally long by what Lightning knows are left alone; of streams, and where
    lengths differ, each batch asks all ranks whether it is the last of any. In validation and test
    no rank waits for another between its batches: each goes through all of its own.

    A rank that has no batch at all, or fewer than its loader's ``len`` or the Trainer's limit says,
    is found when the others are in a step already: all of them raise.

    Raises:
        RuntimeError: On all ranks, naming those that have no batch.
    """

    _asks = _agreed = _warned = False
    _evaluated: int | None = None

    # -- training ------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Compare the lengths of the loaders."""
        self._agreed = False
        self._compare(trainer, pl_module.device)
        _weigh(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin an epoch, whose loader may be another one."""
        self._agreed = False
        if trainer.reload_dataloaders_every_n_epochs:
            self._compare(trainer, pl_module.device)
            _weigh(trainer, pl_module)

    def _compare(self, trainer: Any, device: torch.device) -> None:
        length = float(trainer.num_training_batches)
        check = trainer.val_check_batch  # None where validation goes by time
        check = math.inf if check is None else float(check)
        # The least of the negative is the negative of the largest.
        found = torch.tensor(
            [length, check, -length, -float(_streams(trainer.train_dataloader))],
            dtype=torch.float64,
            device=device,
        )
        distributed.all_reduce(found, op=distributed.ReduceOp.MIN)
        shortest, check, longest, streams = found.tolist()
        self._asks = shortest != -longest or bool(streams)
        if shortest != -longest:
            shorten_epochs(trainer, shortest, check)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask all ranks whether this is the last batch of any; it is then the last of all."""
        if not self._asks:
            return
        codes = _told(_LAST if trainer.is_last_batch else _GOES_ON, pl_module.device)
        _refuse_missing(codes, _ENDED, "training")
        if _LAST not in codes:
            return
        self._agreed = True
        end_epoch_here(trainer)
        more = codes.count(_GOES_ON)
        if more and not self._warned:
            self._warned = True
            warn(
                f"an epoch ends with batch {batch_idx + 1}, the last of {codes.count(_LAST)} of "
                f"{len(codes)} processes; {more} had more, which do not train. Share the data out "
                "evenly, so that no part of it is left out."
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell ranks that are in a step that this one had no batch for it."""
        if not self._asks or self._agreed:
            return
        codes = _told(_ENDED, pl_module.device)
        if set(codes) != {_ENDED}:  # all at once where the Trainer was told to stop
            _refuse_missing(codes, _ENDED, "training")

    # -- evaluation ----------------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a validation."""
        self._evaluated = None

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """See with the first batch of a loader that all ranks have one."""
        if dataloader_idx != self._evaluated:
            self._evaluated = dataloader_idx
            self._meet(dataloader_idx, trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """See that all ranks went through the same loaders."""
        self._meet(-1, trainer, pl_module)

    def _meet(self, loader: int, trainer: Any, pl_module: Any) -> None:
        codes = _told(loader, pl_module.device)
        # The figures of a loader are averaged over ranks, and one without a batch has none.
        _refuse_missing(codes, min(codes), "test" if trainer.testing else "validation")

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_epoch_end = on_validation_epoch_end


def _weigh(trainer: Any, pl_module: Any) -> None:
    """Tell a module of ours how many rows of an epoch the ranks have."""
    if not isinstance(getattr(pl_module, "_rows_of_ranks", None), RowsOfRanks):
        return
    share = share_of(trainer.train_dataloader, trainer.num_training_batches)
    counts = _told(0 if share is None else share.items, pl_module.device)
    known, alike = all(counts), all(counts) and len(set(counts)) == 1
    mean = sum(counts) / len(counts) if known and not alike else None
    pl_module._rows_of_ranks = RowsOfRanks(alike, mean, max(counts))


def _streams(loaders: Any) -> bool:
    """Whether what a loader says of its length may be wrong: it is not counted from rows."""
    return not all(
        isinstance(each, DataLoader) and not isinstance(each.dataset, IterableDataset)
        for each in CombinedLoader(loaders).flattened
    )


def _told(code: int, device: torch.device) -> list[int]:
    """Tell all ranks a number; returns those of all."""
    mine = torch.tensor([code], device=device)
    codes = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(codes, mine)
    return [int(each) for each in codes]


def _refuse_missing(codes: list[int], missing: int, stage: str) -> None:
    if missing not in codes or len(set(codes)) == 1:
        return
    ranks = ", ".join(str(rank) for rank, code in enumerate(codes) if code == missing)
    raise RuntimeError(
        f"the {stage} loader of rank {ranks} has no batch where other ranks have one: it is empty, "
        "or ended before its len(), or before the Trainer's limit of batches. Give each process "
        "at least one batch, and no len() or limit that is more than it has."
    )
