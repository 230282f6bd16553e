"""The Trainer that every Lightning method runs under, and the clock's place in it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from benchmarks.speed.clock import Clock, Stopped
from benchmarks.speed.job import Job


class Timed:
    """Mixed into a LightningModule, ticks the clock as each batch begins.

    A callback would cost some 30 microseconds a step, since Lightning asks each callback at each
    of its hooks; a hook of the module that is called anyway costs one. The optimizer steps, logging
    and the progress bar of all batches before lie between two ticks, and so does fetching this one.
    """

    clock: Clock

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        self.clock.tick(self.trainer.global_step)
        return super().on_train_batch_start(batch, batch_idx)


def scheduler_of(job: Job) -> Callable[[torch.optim.Optimizer], dict[str, Any]] | None:
    """What makes Lightning's dictionary of a learning rate that decays step by step, if it does."""
    if job.decay == 1:
        return None
    return lambda optimizer: {
        "scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, job.decay),
        "interval": "step",
    }


def fit(job: Job, clock: Clock, module: LightningModule, **data: Any) -> None:
    """Train until the clock stops it: progress bar, checkpoints and logger as by default."""
    warnings.filterwarnings("ignore", ".*does not have many workers|.*treespec, LeafSpec")
    module.clock = clock
    if job.device != "cpu":
        clock.sync = torch.cuda.synchronize
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu" if job.device == "cpu" else "gpu",
        devices=1,
        # What the Trainer takes by default where TensorBoard is not installed.
        logger=CSVLogger(job.folder),
        default_root_dir=job.folder,
    )
    try:
        trainer.fit(module, **data)
    except Stopped:
        pass
