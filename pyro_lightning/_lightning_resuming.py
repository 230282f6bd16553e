"""The private names of Lightning that going on from a checkpoint leans on, in one place."""

from itertools import chain, islice
from typing import Any, NamedTuple

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage as EvaluationStage

from pyro_lightning._lightning import loaders_of


class Progress(NamedTuple):
    """Where a checkpoint stands: batches done of an epoch under way, and in which hook."""

    batches: int | None
    in_batch_end: bool
    in_epoch_end: bool


def settle_progress(loops: dict[str, Any]) -> Progress:
    """Set the counters of a checkpoint, in place, to those between two steps or two epochs.

    Lightning tells from the order in which counters were raised in which hook a checkpoint was
    saved, and skips what was to follow: of the last batch of an epoch the validation and all hooks
    of the epoch's end. Under ``max_steps`` it trains one batch too many of an epoch that was over.

    Args:
        loops: What a checkpoint holds of the loop of a fit.
    """
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    now = batch["current"]
    under_way = epoch["current"]["started"] > epoch["current"]["processed"]
    progress = Progress(
        batches=now["processed"] if under_way else None,
        in_batch_end=under_way and now["ready"] == now["processed"] > now["completed"],
        in_epoch_end=not under_way
        and epoch["current"]["processed"] > epoch["current"]["completed"],
    )
    # Lightning knows of a batch that it is the last when it has it, before it is done.
    batch["is_last_batch"] &= under_way and now["ready"] == now["processed"]
    for tracker in (epoch["total"], epoch["current"]):
        done = tracker["processed"]
        begun = done + 1 if under_way else done
        tracker.update(ready=begun, started=begun, processed=done, completed=done)
    for tracker in (batch["total"], now):
        _set_all(tracker, tracker["processed"])
    _set_all(validation["total"], validation["total"]["processed"])
    _set_all(validation["current"], 0)  # a validation that is run again begins anew
    validation["is_last_batch"] = False
    if not under_way:
        _set_all(now, 0)
    states = loops["state_dict"]
    if not any(states.get("combined_loader", ())):
        states.pop("combined_loader", None)
    return progress


def _set_all(tracker: dict[str, int], value: int) -> None:
    tracker.update(dict.fromkeys(tracker, value))


def loaded_in_epoch(trainer: Trainer) -> int | None:
    """In which epoch the training loaders were made, which tells when they are made anew."""
    epoch = trainer.fit_loop._last_train_dl_reload_epoch
    return int(epoch) if epoch >= 0 else None  # minus infinity before they are made


def set_loaded_in_epoch(trainer: Trainer, epoch: int) -> None:
    """Have training loaders made anew as if they were made in an epoch."""
    trainer.fit_loop._last_train_dl_reload_epoch = epoch


def put_loaders(trainer: Trainer, loaders: list[Any]) -> None:
    """Have Lightning iterate over other loaders, from the next iterator on."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    combined.flattened = loaders


def cycles(trainer: Trainer) -> bool:
    """Whether loaders that are at their end begin again in the same epoch."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    return combined._mode == "max_size_cycle"


def makes_iterator(trainer: Trainer) -> bool:
    """Whether Lightning makes an iterator after ``on_train_epoch_start``.

    In the first epoch of a fit it has made one before ``on_train_start``.
    """
    loop = trainer.fit_loop
    return trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting


def iterate(trainer: Trainer, done: int = 0) -> None:
    """Make a new iterator of the training loaders, ``done`` batches of which do not come."""
    fetcher, epoch = trainer.fit_loop._data_fetcher, trainer.fit_loop.epoch_progress.current
    assert fetcher is not None
    for loader in loaders_of(trainer, "training"):
        _set_sampler_epoch(loader, epoch.processed)  # type: ignore[attr-defined]
    iter(fetcher)
    # Lightning adds `done` to what was fetched, and only then is at the end with the next batch.
    if done and fetcher.length is not None:
        fetcher.done = done >= fetcher.length


def take_first(trainer: Trainer, number: int) -> None:
    """Take the next batch of a loader now, for when it is asked for."""
    combined = trainer.fit_loop._combined_loader
    assert combined is not None and combined._iterator is not None
    iterators = combined._iterator.iterators
    iterators[number] = chain(list(islice(iterators[number], 1)), iterators[number])


def go_on(trainer: Trainer, validated: bool, batch_over: bool) -> None:
    """Arrange what the loops do first in an epoch that goes on: what was to follow the checkpoint.

    Args:
        trainer: In ``on_train_start``.
        validated: Whether the validation that may follow the last batch was run.
        batch_over: Whether all else was done that follows a batch.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    if loop.batch_progress.current.ready == 0:
        loop._restarting = False
        return
    if not loop._should_check_val_fx(fetcher):
        if not batch_over:
            loop.update_lr_schedulers("step", update_plateau_schedulers=True)
            loop._batches_that_stepped += not loop._should_accumulate()
    elif not validated:
        loop.val_loop._restart_stage = EvaluationStage.RESTARTED_MID_EVALUATION
    elif batch_over:
        # Lightning passes over the validation, and counts the batch once more.
        loop._batches_that_stepped -= not loop._should_accumulate()


def stop_after_epoch(trainer: Trainer) -> bool:
    """End an epoch that goes on without another batch, if the fit may stop; tells whether it may.

    A Trainer that is told to stop before an epoch goes on leaves out the hooks of its end.
    """
    if not trainer.fit_loop._can_stop_early:
        return False
    fetcher: Any = trainer.fit_loop._data_fetcher
    fetcher.done, fetcher.batches = True, []
    return True


def begin_epoch(trainer: Trainer) -> None:
    """Have the loops begin with an epoch; under ``max_steps`` Lightning always goes on with one."""
    fit = trainer.fit_loop
    for loop in (fit, fit.epoch_loop, fit.epoch_loop.val_loop):
        loop._restarting = False


def end_restart(trainer: Trainer) -> None:
    """Have the end of an epoch that went on step schedulers that watch a figure, as any other's."""
    trainer.fit_loop._restarting = False


def step_plateau_schedulers(trainer: Trainer, epoch: int) -> None:
    """Step the schedulers that watch a figure and are due after an epoch, counted from 0.

    Lightning does so after the last hook of the epoch, in which checkpoints are saved.
    """
    module = trainer.lightning_module
    if not module.automatic_optimization:
        return
    for config in trainer.lr_scheduler_configs:
        due = config.interval == "epoch" and (epoch + 1) % config.frequency == 0
        value = trainer.callback_metrics.get(str(config.monitor))
        if config.reduce_on_plateau and due and value is not None:
            module.lr_scheduler_step(config.scheduler, value)
