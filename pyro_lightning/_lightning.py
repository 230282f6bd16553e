"""The private names of Lightning that the module leans on, in one place."""

import signal
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch.utils.data import DataLoader

# A class method that an instance does not have: whoever calls it there drops what it returns.
restricted_classmethod = _restricted_classmethod


def stage_loader(trainer: Trainer, stage: str) -> Any:
    """Ask the user's hook or argument for the loader of a stage, or None where there is none.

    The public ``setup_data`` of a loop would start the loader's workers and draw its seed, and a
    loop whose loader exists early does not restore the state of a loader from a checkpoint.
    """
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    source = loops[stage]._data_source
    loader = source.dataloader() if source.is_defined() else None
    # Which is its own iterator; it would forget a place that it had.
    return loader.iterables if isinstance(loader, CombinedLoader) else loader


def loses_new_parameters(trainer: Trainer) -> bool:
    """Whether what is made in a fit does not reach the process that called ``Trainer.fit``.

    Launchers of this kind load the weights back with ``strict=False``, without a word of those for
    which the module there has no place.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def ends_in_child(module: LightningModule) -> bool:
    """Whether a fit has ended in a process whose launcher hands its weights to the one before."""
    trainer = module._trainer
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return False
    ended, launcher = trainer.state.status == TrainerStatus.FINISHED, trainer.strategy.launcher
    # Where they were started from, the launcher lists the processes.
    return ended and isinstance(launcher, _MultiProcessingLauncher) and not launcher.procs


def resumes_fit(module: LightningModule) -> bool:
    """Whether a checkpoint is loaded to go on with its fit."""
    return stage_of(module) == TrainerFn.FITTING.value


def stage_of(module: LightningModule) -> str | None:
    """What a Trainer is doing with the module: ``"fit"``, ``"validate"`` and so on; or None."""
    trainer = module._trainer
    if trainer is None or trainer.state.fn is None:
        return None
    return trainer.state.fn.value if trainer.state.status == TrainerStatus.RUNNING else None


def logs_this_step(trainer: Trainer) -> bool:
    """Whether the loggers get the figures of the step that is taken now."""
    return trainer._logger_connector.should_update_logs


def step_is_due(trainer: Trainer) -> bool:
    """Whether the loggers get figures by the number of the step alone, alike on all ranks.

    Before ``on_train_batch_end`` is over. Where the Trainer is told to stop, it logs any step.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    number = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    return bool(every) and number % every == 0


def shares_of_rows(trainer: Trainer) -> dict[str, Any] | None:
    """How rows are shared out: ``num_replicas`` and ``rank``; None where Lightning would not."""
    connector = trainer._accelerator_connector
    if connector.use_distributed_sampler and connector.is_distributed:
        return trainer.distributed_sampler_kwargs
    return None


def loaders_of_batch(module: LightningModule, dataloader_idx: int) -> list[Any]:
    """The loaders that made the batch of a step; none outside a Trainer's loops.

    Of several loaders evaluations go through one after the other, unless they are combined in
    another mode; training takes a batch of each.
    """
    trainer = module._trainer
    loop: Any = None if trainer is None else trainer._active_loop
    combined = getattr(loop, "_combined_loader", None)
    if trainer is None or combined is None:
        return []
    in_turn = loop is trainer.predict_loop or getattr(loop, "_is_sequential", False)
    return [combined.flattened[dataloader_idx]] if in_turn else combined.flattened


def loaders_of(trainer: Trainer, stage: str) -> list[Any]:
    """List the loaders of a stage, ``"training"`` or another, as they are gone through.

    None before they are made.
    """
    loops: dict[str, list[Any]] = {
        "training": [trainer.fit_loop],
        "validation": [trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop],
        "test": [trainer.test_loop],
        "prediction": [trainer.predict_loop],
    }
    found = (loop._combined_loader for loop in loops[stage])
    return next((list(each.flattened) for each in found if each is not None), [])


def wrapped_batches(loader: Any) -> Any:
    """What makes the batches of a loader that Lightning predicts from; None where nothing is
    wrapped to note the numbers of the rows.
    """
    batches = getattr(loader, "batch_sampler", None)
    return batches._batch_sampler if isinstance(batches, _IndexBatchSamplerWrapper) else None


def unshared(loader: Any) -> Any:
    """A loader as it was before Lightning shared out a sampler that is no torch's own."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSamplerWrapper):
        return loader
    rows: Any = sampler.dataset
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=rows._sampler)


def transferred(module: LightningModule, batch: Any, device: torch.device) -> Any:
    """Put a batch through the precision plugin and the transfer hooks, as a step would."""
    batch = module.trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch)
    return module._apply_batch_transfer_handler(batch, device=device)


def count_optimizer_steps(trainer: Trainer, steps: int) -> None:
    """Count optimizer steps that did not go through Lightning's optimizer, for ``global_step``."""
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    for tracker in (progress.total, progress.current):
        tracker.ready += steps
        tracker.completed += steps


def end_epoch_here(trainer: Trainer) -> None:
    """Make the batch that is about to train the last of its epoch, with all that follows from it.

    The loop sets this mark itself where it has looked ahead and found no other batch.
    """
    trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True


def shorten_epochs(trainer: Trainer, batches: float, check: float) -> None:
    """Have epochs hold this many batches, with a validation after every ``check`` of them."""
    trainer.fit_loop.max_batches = batches if batches == float("inf") else int(batches)
    if trainer.val_check_batch is not None:
        trainer.val_check_batch = check if check == float("inf") else int(check)


class BeforeTrainingBatch(LightningModule):
    """A hook before anyone sees a batch: ``on_train_batch_start`` of callbacks precedes ours."""

    def before_training_batch(self) -> None:
        """Come before callbacks."""

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        trainer = self._trainer
        if trainer is not None and trainer.training:
            self.before_training_batch()
        return super()._on_before_batch_transfer(batch, dataloader_idx)


def tell_loggers(trainer: Trainer, step: int) -> None:
    """Set the step, counted from 0, under which loggers get figures, until Lightning adds one.

    Lightning counts batches of the loader for loggers, and optimizer steps for all else.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def checkpoint_triggers(trainer: Trainer) -> list[tuple[int, bool]]:
    """Return ``every_n_train_steps``, and whether time counts, of each ``ModelCheckpoint``."""
    return [
        (each._every_n_train_steps, each._train_time_interval is not None)
        for each in trainer.checkpoint_callbacks
        if isinstance(each, ModelCheckpoint)
    ]


def signals_of(trainer: Trainer) -> list[int]:
    """List the signals that stop a fit or save its state: Ctrl-C, and those Lightning handles."""
    found = []
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if isinstance(handler, _HandlersCompose) or handler is signal.default_int_handler:
            found.append(int(number))
    return sorted(found)


def watch_batches(trainer: Trainer, watch: Callable[[Any, Any], Any]) -> None:
    """Put something between the loaders of the stage that runs and the loop that takes batches.

    Neither the Trainer's nor the user's loaders are another: ``watch`` is given the fetcher of the
    loop and its ``CombinedLoader``, which is its own iterator, and returns what is iterated.
    """
    loop: Any = trainer.fit_loop if trainer.training else trainer._evaluation_loop
    fetcher = loop._data_fetcher
    if fetcher is None or not isinstance(fetcher.combined_loader, CombinedLoader):
        return  # no batches, or watched already
    watched = watch(fetcher, fetcher.combined_loader)
    fetcher.setup(watched)
    fetcher.iterator = watched


def pass_over(batches: CombinedLoader) -> tuple[int, int]:
    """Count a batch that a loader could not make; returns its number, and that of its loader."""
    counted: Any = batches._iterator
    number = counted._idx
    counted._idx += 1
    return number, getattr(counted, "_iterator_idx", 0)
