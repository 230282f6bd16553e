"""Going on with a fit from a checkpoint, as if it had not been interrupted."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed
from torch.optim import Optimizer

from pyro_lightning import _lightning
from pyro_lightning.baselines import DecayingBaselines
from pyro_lightning.figures import Figures
from pyro_lightning.random_states import (
    generator_states,
    random_states,
    set_generator_states,
    set_random_states,
    torch_states,
)
from pyro_lightning.rank_zero import warn
from pyro_lightning.rest_of_epoch import draws_rows, generators_of, rest_of, seeds_of, set_seeds
from pyro_lightning.signals import HeldSignals

_KEY = "pyro_lightning_resume"


class FitState:
    """What a module remembers of its fit for a checkpoint, and of a checkpoint for its fit.

    Attributes:
        loaded: What a checkpoint holds of the fit that goes on, until its first step.
        progress: Where that checkpoint stands.
        replaced: The training loaders, while others stand in for them.
        epoch_began: Random states when the rows of the epoch were drawn.
        before_step: torch's random states before the step that is being taken.
        before_validation: Random states before the validation that runs.
        validated: Whether the last validation has come to its end.
        updates: Whether the step that is being taken has begun to change what it cannot undo.
        stops: Whether the fit stops after this epoch, as the one that was saved was about to.
        signals: Signals that wait for the end of a step.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None
        self.progress: _lightning.Progress | None = None
        self.replaced: list[Any] | None = None
        self.epoch_began: dict[str, Any] | None = None
        self.before_step: dict[str, Any] | None = None
        self.before_validation: dict[str, Any] | None = None
        self.validated = False
        self.updates = False
        self.stops = False
        self.signals = HeldSignals()

    def __reduce__(self) -> Any:
        return FitState, ()  # it belongs to one fit in one process, and no copy of a module to that


class Resume(Figures):
    """Keeps in checkpoints what Lightning leaves out, and puts it back before the next step.

    Lightning counts the batches of an epoch that were done, and begins the epoch's rows anew; it
    keeps no random states. Here a checkpoint has those of each process, now and when the rows of
    its epoch were drawn: the same rows are drawn again, and those that are done left out.
    """

    _fit_state: FitState
    _baselines: DecayingBaselines | None

    # -- saving --------------------------------------------------------------------------------

    def _loaders(self) -> tuple[list[Any], list[Any]]:
        """The loaders of training and of validation."""
        of = partial(_lightning.loaders_of, self.trainer)
        return of("training"), of("validation")

    def _snapshot(self) -> dict[str, Any]:
        """Return all random states of this process that a fit draws from."""
        return {
            "random": random_states(self.trainer.strategy.root_device),
            "loaders": [
                [generator_states(generators_of(loader)) for loader in loaders]
                for loaders in self._loaders()
            ],
        }

    def _put_back(self, snapshot: dict[str, Any]) -> None:
        set_random_states(snapshot["random"], self.trainer.strategy.root_device)
        for loaders, states in zip(self._loaders(), snapshot["loaders"], strict=True):
            for loader, kept in zip(loaders, states, strict=False):
                generators = generators_of(loader)
                if len(generators) == len(kept):
                    set_generator_states(generators, kept)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the random states of all processes, and what is known of the epoch so far.

        Raises:
            RuntimeError: In the middle of an update of parameters, whose state is no step's; what
                was saved before stays.
        """
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" not in checkpoint:
            return  # of weights alone, from which no fit goes on
        state, trainer = self._fit_state, self.trainer
        batch = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        in_step = batch["ready"] > batch["processed"]
        if in_step and state.updates:
            state.signals.release()
            raise RuntimeError(
                "a checkpoint was to be saved in the middle of a step, when some parameters are "
                "those after it and others those before. Nothing was written: go on from the "
                "checkpoint before. Save in on_train_batch_end."
            )
        validating = trainer.validating and trainer.state.fn == "fit" and not state.validated
        if validating and state.before_validation is not None:
            now = state.before_validation
        else:
            now = self._snapshot()
        if in_step and state.before_step is not None:
            now["random"].update(state.before_step)
        epoch = self._epoch and (self._epoch[0].cpu(), self._epoch[1])
        rank = {
            "now": now,
            "epoch_began": state.epoch_began,
            "seeds": [seeds_of(loader) for loader in _lightning.loaders_of(trainer, "training")],
            "epoch": epoch,
            "baselines": self._baselines and self._baselines.get_extra_state(),
            "gradients": self._unused_gradients(batch["processed"]),
        }
        checkpoint[_KEY] = {
            "num_training_batches": trainer.num_training_batches,
            "in_validation": validating,
            "batch_over": not (trainer.validating or batch["processed"] > batch["completed"]),
            "metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
            "should_stop": trainer.should_stop,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "ranks": _gathered(rank),
        }

    def _unused_gradients(self, batches: int) -> dict[str, torch.Tensor] | None:
        """Return the gradients that wait for more batches to be added, by parameter."""
        if not batches % self.trainer.accumulate_grad_batches:
            return None
        named = dict(self.named_parameters())
        return {name: p.grad.cpu() for name, p in named.items() if p.grad is not None}

    # -- loading -------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Begin to remember a fit."""
        self._fit_state = FitState()
        super().setup(stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read where a fit stands that goes on.

        Raises:
            ValueError: In the middle of an epoch, when there were more processes, or fewer.
        """
        super().on_load_checkpoint(checkpoint)
        if not _lightning.resumes_fit(self) or "loops" not in checkpoint:
            return
        state = self._fit_state
        state.progress = _lightning.settle_progress(checkpoint["loops"]["fit_loop"])
        state.loaded = checkpoint.get(_KEY)
        if state.loaded is None:
            warn(
                "the checkpoint has no random states: it was not written by this version. The fit "
                "goes on with other noise and another order of rows than it would have had.",
                stacklevel=2,
            )
            return
        saved, world = len(state.loaded["ranks"]), self.trainer.world_size
        if saved != world and state.progress.batches:
            raise ValueError(
                f"the checkpoint was saved by {saved} processes in the middle of an epoch, after "
                f"{state.progress.batches} batches of each, and there are {world} now: the rows "
                f"that are left cannot be shared out anew. Resume with {saved}, or from a "
                "checkpoint of an epoch's end."
            )
        if saved != world:
            warn(
                f"the checkpoint was saved by {saved} processes, and there are {world} now: the "
                "fit goes on with other batches than it would have had.",
                stacklevel=2,
            )

    def _follow_loader(self, batch: Any) -> None:
        """Read the loader's sizes; refuse to train on without what a checkpoint holds."""
        if self._fit_state.progress is not None:
            raise RuntimeError(
                "a fit that goes on from a checkpoint was to begin where it stands, in "
                f"{type(self).__name__}.on_train_start: have yours call super().on_train_start()"
            )
        super()._follow_loader(batch)

    # -- hooks ---------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Go on where the checkpoint stands, as the last thing before the next step.

        Raises:
            ValueError: In the middle of an epoch, when the loader has another number of batches.
        """
        super().on_train_start()
        progress = self._fit_state.progress
        if progress is None:
            return
        trainer, loaded = self.trainer, self._fit_state.loaded
        rank: dict[str, Any] = {}
        if loaded is not None:
            rank = self._restore(loaded, progress)
        if progress.batches is None:
            _lightning.begin_epoch(trainer)
            if progress.in_epoch_end:
                _lightning.step_plateau_schedulers(trainer, trainer.current_epoch - 1)
        else:
            self._go_on_in_epoch(progress.batches, rank)
            in_validation = loaded is not None and loaded["in_validation"]
            _lightning.go_on(
                trainer,
                validated=not (in_validation or progress.in_batch_end),
                batch_over=loaded is not None and loaded["batch_over"],
            )
        if loaded is not None and loaded["should_stop"]:
            self._stop(in_epoch=progress.batches is not None)
        # Before the first batch of an epoch its rows are still to be drawn.
        if rank and progress.batches != 0:
            self._put_back(rank["now"])
        self._fit_state.loaded = self._fit_state.progress = None

    def _restore(self, loaded: dict[str, Any], progress: _lightning.Progress) -> dict[str, Any]:
        """Put back what is no random state; returns what was this process's own."""
        trainer = self.trainer
        count = loaded["num_training_batches"]
        if progress.batches and count != trainer.num_training_batches:
            raise ValueError(
                f"the checkpoint stands after {progress.batches} of {count} batches of an epoch, "
                f"and the loader has {trainer.num_training_batches} now. Resume with the loader "
                "that it had, or from a checkpoint of an epoch's end."
            )
        trainer.callback_metrics.update(loaded["metrics"])
        if any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.accumulate_grad_batches = loaded["accumulate_grad_batches"]
        if trainer.global_rank >= len(loaded["ranks"]):
            return {}
        rank: dict[str, Any] = loaded["ranks"][trainer.global_rank]
        if rank["epoch"] is not None:
            total, rows = rank["epoch"]
            self._epoch = total.to(self.device), rows
        if self._baselines is not None and rank["baselines"] is not None:
            self._baselines.set_extra_state(rank["baselines"])
        for name, parameter in self.named_parameters():
            if name in (rank["gradients"] or {}):
                parameter.grad = rank["gradients"][name].to(parameter.device)
        return rank

    def _go_on_in_epoch(self, batches: int, rank: dict[str, Any]) -> None:
        """Have the loaders draw the rows of the epoch again, without those that are done."""
        trainer, loaders = self.trainer, _lightning.loaders_of(self.trainer, "training")
        self._fit_state.epoch_began = began = rank.get("epoch_began")
        if any(_is_stateful(loader) for loader in loaders):
            return  # Lightning has given it back its state
        for loader, seeds in zip(loaders, rank.get("seeds", ()), strict=False):
            if len(seeds) == len(seeds_of(loader)):
                set_seeds(loader, seeds)
        if began is not None:
            self._put_back(began)
        rests = [rest_of(loader, self._done_of(loader, batches)) for loader in loaders]
        _lightning.put_loaders(trainer, [loader for loader, _ in rests])
        self._fit_state.replaced = loaders
        _lightning.iterate(trainer, batches)
        for number, (_, rest) in enumerate(rests):
            if batches and not rest.skip():  # a loader whose __iter__ is a generator
                _lightning.take_first(trainer, number)

    def _stop(self, in_epoch: bool) -> None:
        """Stop as the fit that was saved was about to, by a callback's decision."""
        rank_zero_info(
            "The checkpoint is of a fit that was about to stop, and stops here, too. To train on, "
            "say for how long: Trainer(min_epochs=...)."
        )
        self._fit_state.stops = in_epoch and _lightning.stop_after_epoch(self.trainer)
        self.trainer.should_stop = not self._fit_state.stops

    def _give_back_loaders(self) -> None:
        if self._fit_state.replaced is not None:
            _lightning.put_loaders(self.trainer, self._fit_state.replaced)
            self._fit_state.replaced = None

    def _done_of(self, loader: Any, batches: int) -> int:
        """Count the batches of a loader that were taken since it last began."""
        length = len(loader) if hasattr(loader, "__len__") and draws_rows(loader) else batches
        if batches > length and _lightning.cycles(self.trainer):
            warn(
                "a loader that is shorter than the epoch has begun again in the epoch that goes "
                "on: its rows now come in another order than they would have.",
                stacklevel=2,
            )
            return (batches - 1) % length + 1
        return min(batches, length)

    def on_train_epoch_start(self) -> None:
        """Remember the random states with which the rows of an epoch are drawn."""
        super().on_train_epoch_start()
        self._give_back_loaders()
        self._fit_state.epoch_began = self._snapshot()
        # Lightning has drawn those of the first epoch already, when nobody was asked.
        loaders = _lightning.loaders_of(self.trainer, "training")
        if all(map(draws_rows, loaders)) and not _lightning.makes_iterator(self.trainer):
            _lightning.iterate(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Remember the random states before a step."""
        self._give_back_loaders()
        self._fit_state.before_step = torch_states(self.trainer.strategy.root_device)
        self._fit_state.updates = False
        return super().on_train_batch_start(batch, batch_idx)

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """Note that gradients that a later batch needs are about to change."""
        super().on_before_backward(loss)
        if self.trainer.accumulate_grad_batches > 1:
            self._fit_state.updates = True

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Note that parameters are about to change."""
        super().on_before_optimizer_step(optimizer)
        self._fit_state.updates = True

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note that a step is over, and that no validation has followed it."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        state = self._fit_state
        state.before_step, state.updates, state.validated = None, False, False

    def on_validation_model_zero_grad(self) -> None:
        """Remember the random states before a validation, whose loaders draw from here on."""
        super().on_validation_model_zero_grad()
        self._fit_state.before_validation = self._snapshot()

    def on_validation_start(self) -> None:
        """Remember the random states before a validation."""
        super().on_validation_start()
        if self._in_fit():
            self._fit_state.validated = False
            if self._fit_state.before_validation is None:
                self._fit_state.before_validation = self._snapshot()

    def on_validation_epoch_end(self) -> None:
        """Note that a validation is over, and go on with the random states before it.

        The noise of training is then the same with and without validations.
        """
        super().on_validation_epoch_end()
        if self._in_fit():
            self._fit_state.validated = True
            if self._fit_state.before_validation is not None:
                device = self.trainer.strategy.root_device
                set_random_states(self._fit_state.before_validation["random"], device)
            self._fit_state.before_validation = None

    def on_train_epoch_end(self) -> None:
        """Log the epoch; one that goes on ends as any other."""
        super().on_train_epoch_end()
        _lightning.end_restart(self.trainer)
        self.trainer.should_stop |= self._fit_state.stops

    def _in_fit(self) -> bool:
        return self.trainer.state.fn == "fit" and not self.trainer.sanity_checking


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _gathered(value: Any) -> list[Any]:
    """Return what each process has, in the order of ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
