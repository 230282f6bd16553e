"""Batches that a loader could not make: an error with their number, or something in their place."""

from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from pyro_lightning._lightning import pass_over
from pyro_lightning._upstream import came_from_data, came_from_worker
from pyro_lightning.retold import retell
from pyro_lightning.row_numbers import numbers_in_order
from pyro_lightning.rows import shown


class FailedBatch:
    """What comes in the place of a batch that its loader could not make, where such are skipped.

    Hooks that look into batches meet it with ``PyroSVIModule(..., bad_batches="skip")``.

    Args:
        error: What the loader raised.
        where: Which batch it is.

    Example:
        >>> failed = FailedBatch(OSError("no such file"), "training batch 3 of epoch 0")
        >>> failed.where, str(failed.error)
        ('training batch 3 of epoch 0', 'no such file')

    Attributes:
        error: What the loader raised.
        where: Which batch it is.
    """

    def __init__(self, error: Exception, where: str) -> None:
        self.error, self.where = error, where


class WatchedBatches:
    """Stands between loaders and the loop that takes their batches, for errors of the loaders.

    Args:
        batches: The loaders, as the loop would iterate them.
        fetcher: The loop's own, which counts batches.
        trainer: The Trainer.
        skips: Whether a batch that cannot be made becomes a :class:`FailedBatch`.
    """

    def __init__(self, batches: CombinedLoader, fetcher: Any, trainer: Any, skips: bool) -> None:
        self.batches, self.fetcher, self.trainer, self.skips = batches, fetcher, trainer, skips
        self.stage = stage_name(trainer)
        self.failed: tuple[str, Exception] | None = None

    def __iter__(self) -> "WatchedBatches":
        iter(self.batches)
        self.failed = None
        return self

    def __len__(self) -> int:
        return len(self.batches)

    def reset(self) -> None:
        """Shut down workers."""
        self.batches.reset()

    def __next__(self) -> Any:
        try:
            return next(self.batches)
        except StopIteration as end:
            # The loop asks for no more batches than there are, where it knows how many.
            if self.failed is not None:
                where, error = self.failed
                retell(error, where, " The loader has no batches after this one.")
            if came_from_data(end):
                where = self._where(self.fetcher.fetched, 0)
                raise RuntimeError(
                    f"{where}: the data set raised StopIteration, which loaders take for the end "
                    "of an epoch. Give next() a default in it, or catch this."
                ) from end
            raise
        except Exception as error:
            number, loader = pass_over(self.batches)
            if self.stage == "training":
                number = self.fetcher.fetched  # that of the epoch, where it was resumed
            where = self._where(number, loader)
            if not (self.skips and self._goes_on(loader, error)):
                retell(error, where)
            # What it went through holds this object, and the loader's workers with it.
            error.__traceback__ = None
            self.failed = self.failed or (where, error)
            return FailedBatch(error, where), number, loader

    def _where(self, number: int, loader: int) -> str:
        several = self.stage != "training" and len(self.batches.flattened) > 1
        where = batch_name(self.trainer, self.stage, number, loader if several else None)
        flat = self.batches.flattened
        if len(flat) > loader and self.trainer.ckpt_path is None:
            rows = numbers_in_order(flat[loader], number)
            where += f" (rows {shown(rows)} of the data set)" if rows else ""
        return f"{where} could not be loaded"

    def _goes_on(self, loader: int, error: Exception) -> bool:
        """Whether the loader can be asked for the batch after one that it could not make."""
        flat = self.batches.flattened
        if self.stage == "training" and len(flat) > 1:
            return False
        mine = flat[loader]
        if not isinstance(mine, DataLoader) or isinstance(mine.dataset, IterableDataset):
            return False
        return mine.num_workers == 0 or came_from_worker(error)


def stage_name(trainer: Any) -> str:
    """Name what the Trainer does."""
    if trainer.training:
        return "training"
    return "test" if trainer.testing else "validation"


def batch_name(trainer: Any, stage: str, number: int, loader: int | None) -> str:
    """Name a batch, counted from 0 as Lightning counts."""
    name = f"{stage} batch {number}"
    if loader is not None:
        name += f" of loader {loader}"
    return f"{name} of epoch {trainer.current_epoch}" if trainer.state.fn == "fit" else name
