"""What a checkpoint holds of a fit besides Lightning's, as hooks have remembered it."""

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from pyro_lightning import _lightning, _lightning_resuming
from pyro_lightning.baselines import DecayingBaselines
from pyro_lightning.figures import Figures
from pyro_lightning.fit_state import FitState
from pyro_lightning.processes import everyones
from pyro_lightning.random_states import (
    generator_states,
    random_states,
    set_random_states,
    torch_states,
)
from pyro_lightning.rest_of_epoch import draws_rows, generators_of, seeds_of

RESUME_KEY = "pyro_lightning_resume"


class SavedFits(Figures):
    """Keeps in checkpoints what Lightning leaves out.

    Lightning keeps no random states. Here a checkpoint has those of each process, now and when the
    rows of its epoch were drawn, and what a step, an epoch or a validation had begun.
    """

    _fit_state: FitState
    _baselines: DecayingBaselines | None

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
            "compiled": self._compiled and self._compiled.kept(),
        }
        checkpoint[RESUME_KEY] = {
            "num_training_batches": trainer.num_training_batches,
            "in_validation": validating,
            "batch_over": not (trainer.validating or batch["processed"] > batch["completed"]),
            "metrics": {name: value.cpu() for name, value in trainer.callback_metrics.items()},
            "should_stop": trainer.should_stop,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "loaders_of_epoch": _lightning_resuming.loaded_in_epoch(trainer),
            "ranks": everyones(rank),
        }

    def _unused_gradients(self, batches: int) -> dict[str, torch.Tensor] | None:
        """Return the gradients that wait for more batches to be added, by parameter."""
        if not batches % self.trainer.accumulate_grad_batches:
            return None
        named = dict(self.named_parameters())
        return {name: p.grad.cpu() for name, p in named.items() if p.grad is not None}

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Begin to remember a fit."""
        self._fit_state = FitState()
        super().setup(stage)

    def on_train_epoch_start(self) -> None:
        """Remember the random states with which the rows of an epoch are drawn."""
        super().on_train_epoch_start()
        self._fit_state.epoch_began = self._snapshot()
        # Lightning has drawn those of the first epoch already, when nobody was asked.
        loaders = _lightning.loaders_of(self.trainer, "training")
        if all(map(draws_rows, loaders)) and not _lightning_resuming.makes_iterator(self.trainer):
            _lightning_resuming.iterate(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Remember the random states before a step."""
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

    def _in_fit(self) -> bool:
        return self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
