"""What watches the loaders of a fit, and counts the batches that it skips."""

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import distributed

from pyro_lightning._lightning import watch_batches
from pyro_lightning.rank_zero import warn
from pyro_lightning.skipped import Skipped
from pyro_lightning.watched import WatchedBatches, stage_name


class BatchWatch(Callback):
    """Watches the loaders of a :class:`PyroSVIModule`, and counts what it skips.

    A callback, since a hook of the module is gone where a subclass has its own.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    # -- loaders -------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the loader, and go on with what a checkpoint has counted."""
        if not _is_served(pl_module):
            return
        self._watch(trainer, pl_module)
        pl_module._passes["training"] = Skipped()
        if self._restored is not None:
            pl_module._unusable = self._restored["unusable"]
            vars(pl_module._passes["training"]).update(self._restored["counts"])
            self._restored = None
        if not pl_module._skips:  # every row trains from here on, or the fit ends
            pl_module._unusable = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count; watch a loader that was made anew."""
        if not _is_served(pl_module):
            return
        self._watch(trainer, pl_module)
        pl_module._passes["training"] = Skipped()
        if trainer.reload_dataloaders_every_n_epochs:
            pl_module._layouts.clear()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the loaders of an evaluation."""
        if not _is_served(pl_module):
            return
        self._watch(trainer, pl_module)
        pl_module._passes[stage_name(trainer)] = Skipped()

    on_test_start = on_validation_start

    def _watch(self, trainer: Any, pl_module: Any) -> None:
        watch_batches(
            trainer, lambda fetcher, all: WatchedBatches(all, fetcher, trainer, pl_module._skips)
        )

    # -- counts --------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what was skipped, and count the rows that cannot train out of N.

        Raises:
            ValueError: Where all batches were skipped.
        """
        if not _is_served(pl_module) or not pl_module._skips:
            return
        # One that a number of steps cuts short knows less than the epoch before it.
        whole = trainer.current_epoch == 0 or _is_through(trainer, pl_module)
        counts = self._close(trainer, pl_module, "training", "train", whole)
        before = pl_module.dataset_size
        if whole:
            pl_module._unusable = counts.share()
        if counts.batches:
            n = pl_module._whole_size()
            warn(
                f"{self._told(counts, f'training epoch {trainer.current_epoch}')} N, "
                f"{n} with all rows, counts {pl_module.dataset_size}"
                f"{'' if before == pl_module.dataset_size else ' from here on'}.",
            )

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what an evaluation skipped.

        Raises:
            ValueError: Where it skipped all.
        """
        if not _is_served(pl_module) or not pl_module._skips or trainer.sanity_checking:
            return
        stage = stage_name(trainer)
        short = "test" if stage == "test" else "val"
        counts = self._close(trainer, pl_module, stage, short)
        if counts.batches:
            told = self._told(counts, stage)
            warn(f"{told} {short}_loss is that of the others.")

    on_test_epoch_end = on_validation_epoch_end

    def _close(
        self, trainer: Any, pl_module: Any, stage: str, short: str, whole: bool = True
    ) -> Skipped:
        """Add up what all ranks have counted, and log it."""
        counts: Skipped = pl_module._passes[stage]
        names = ("seen", "batches", "rows", "unusable")
        if trainer.world_size > 1:
            counted = [getattr(counts, name) for name in names]
            numbers = torch.tensor(counted, device=pl_module.device)
            distributed.all_reduce(numbers)
            for name, number in zip(names, numbers.tolist(), strict=True):
                setattr(counts, name, number)
        for name in ("batches", "rows"):
            value = torch.tensor(float(getattr(counts, name)), device=pl_module.device)
            pl_module.log(f"{short}_skipped_{name}", value, sync_dist=True, batch_size=1)
        if whole and counts.batches and counts.rows >= counts.seen:
            raise ValueError(
                f"all {counts.batches} batches of this {stage} epoch were skipped, so that there "
                f"is nothing to go on with. {counts.first}"
            )
        return counts

    def _told(self, counts: Skipped, what: str) -> str:
        first = counts.first or "told by another process."
        return (
            f"batches skipped in {what}: {counts.batches}, with {counts.rows} of "
            f"{counts.seen} rows. "
            f"The first: {first.rstrip('.')}."
        )

    # -- checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Keep what was counted."""
        if _is_served(pl_module) and pl_module._skips and "training" in pl_module._passes:
            counts = {**vars(pl_module._passes["training"])}
            kept = {"unusable": pl_module._unusable, "counts": counts}
            checkpoint["pyro_lightning_skipped"] = kept

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Read what was counted."""
        self._restored = checkpoint.get("pyro_lightning_skipped")


def _is_through(trainer: Any, pl_module: Any) -> bool:
    """Whether a loader of any process is at its end, as all processes must agree."""
    if trainer.world_size == 1:
        return bool(trainer.is_last_batch)
    through = torch.tensor(float(trainer.is_last_batch), device=pl_module.device)
    distributed.all_reduce(through, op=distributed.ReduceOp.MAX)
    return bool(through)


def _is_served(module: Any) -> bool:
    """Whether a module counts what it skips; a Trainer keeps its callbacks for whatever it fits."""
    return hasattr(module, "_passes")
