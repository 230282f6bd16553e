"""The private names of Lightning that the module leans on, in one place."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader


def stage_loader(trainer: Trainer, stage: str) -> Any:
    """Ask the user's hook or argument for the loader of a stage, or None where there is none.

    The public ``setup_data`` of a loop would start the loader's workers and draw its seed, and a
    loop whose loader exists early does not restore the state of a loader from a checkpoint.
    """
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
    }
    source = loops[stage]._data_source
    return source.dataloader() if source.is_defined() else None


def loses_new_parameters(trainer: Trainer) -> bool:
    """Whether what is made in a fit does not reach the process that called ``Trainer.fit``.

    Launchers of this kind load the weights back with ``strict=False``, without a word of those for
    which the module there has no place.
    """
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def resumes_fit(module: LightningModule) -> bool:
    """Whether a checkpoint is loaded to go on with its fit."""
    trainer = module._trainer
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def logs_this_step(trainer: Trainer) -> bool:
    """Whether the loggers get the figures of the step that is taken now."""
    return trainer._logger_connector.should_update_logs


def shares_of_rows(trainer: Trainer) -> dict[str, Any] | None:
    """How rows are shared out: ``num_replicas`` and ``rank``; None where Lightning would not."""
    connector = trainer._accelerator_connector
    if connector.use_distributed_sampler and connector.is_distributed:
        return trainer.distributed_sampler_kwargs
    return None


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
