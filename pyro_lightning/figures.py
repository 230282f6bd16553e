"""What a fit logs: losses of steps, epochs and evaluations."""

import time
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback
from torch import distributed

from pyro_lightning._lightning import logs_this_step, step_is_due
from pyro_lightning.metric_hooks import MetricHooks

_REFRESH = 0.1  # seconds between two figures of the progress bar


class StepResult(NamedTuple):
    """What a step has to log: its loss, its B, and whether the loss is the whole data set's.

    B is 0 for a batch of repeated rows alone.
    """

    loss: torch.Tensor
    rows: int
    whole: bool


class EpochFigures(Callback):
    """Logs the figures of an epoch before other callbacks come to its end.

    Callbacks have their hook before the module has, and would find those of the last step; and a
    hook of a subclass takes the place of the module's.
    """

    _begun = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take note of the steps that are done."""
        self._begun = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Share the figure of a step, before other callbacks and schedulers read it."""
        if isinstance(pl_module, Figures) and trainer.world_size > 1:
            pl_module._share_step(self._begun, first=batch_idx == 0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the steps have added up."""
        if isinstance(pl_module, Figures):
            pl_module._log_epoch()

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Have metrics forget the batches of the validation before."""
        if isinstance(pl_module, Figures):
            pl_module._begin_metrics("val", len(trainer.num_val_batches))

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Have metrics forget the batches of the test before."""
        if isinstance(pl_module, Figures):
            pl_module._begin_metrics("test", len(trainer.num_test_batches))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the metrics give."""
        if isinstance(pl_module, Figures):
            pl_module._log_metrics("val")

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the metrics give."""
        if isinstance(pl_module, Figures):
            pl_module._log_metrics("test")


class Figures(MetricHooks):
    """Logs losses as sums over N observations in nats, and per observation.

    ``self.log`` takes as long as a small step does: figures of an epoch are added up here and
    logged once, those of a step when a logger will have them.
    """

    steps_per_batch: int
    _epoch: tuple[torch.Tensor, int] | None = None
    _of_step: tuple[torch.Tensor, int] | None = None
    _shown: torch.Tensor | None = None
    _shown_at: float = 0.0

    def _per_observation(self, result: StepResult) -> torch.Tensor:
        size = self._known_size() if result.whole else max(result.rows, 1)
        return result.loss.detach() / size

    def _log_evaluation(self, stage: str, batch: Any, *numbers: int) -> None:
        """Log the figures of a batch of an evaluation, of this number and of this loader."""
        found, rows = None, 0
        if not self._begin():
            batch, rows = self._without_repeats(batch, *numbers)
            found = self._attempt(partial(self._estimate, batch, held_out=True), rows)
        if found is not None:
            per_obs = self._per_observation(StepResult(found[0], rows, found[1]))
            self._update_metrics(stage, batch, rows, per_obs, *numbers)
        elif self.trainer.world_size == 1:
            return
        else:
            per_obs, rows = torch.zeros((), device=self.device), 0  # figures meet on all ranks
        self.log_mean(f"{stage}_loss", per_obs * self._known_size(), rows)
        self.log_mean(f"{stage}_loss_per_obs", per_obs, rows, prog_bar=True)

    def _log_step(self, result: StepResult) -> None:
        """Log a step; the only one of a batch of the loader."""
        per_obs = self._per_observation(result)
        self._add_to_epoch(per_obs, result.rows)
        if self.trainer.world_size > 1:
            self._of_step = per_obs, result.rows
        elif logs_this_step(self.trainer):
            name = "train_loss_per_obs_step"
            self.log(name, per_obs, on_step=True, on_epoch=False, batch_size=result.rows)

    def _share_step(self, begun: int, first: bool) -> None:
        """Log the mean of a step over the rows of all ranks, where it is due.

        A rank's own would lead its schedulers and callbacks elsewhere than those of others, and the
        parameters with them. A rank may have skipped the step.

        Args:
            begun: How many optimizer steps were done before the batch.
            first: Whether the batch is the epoch's first, from which on the bar shows a figure.
        """
        found, self._of_step = self._of_step, None
        due = step_is_due(self.trainer)
        if self.steps_per_batch > 1:  # loggers are told of a step by what a rank has run
            every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            due = bool(every) and self.trainer.global_step // every > begun // every
        if not (due or first):
            return
        per_obs, rows = found or (torch.zeros(()), 0)
        total = float(per_obs) * rows if rows else 0.0
        shared = torch.tensor([total, float(rows)], device=self.device)
        distributed.all_reduce(shared)
        if not shared[1]:
            return
        mean = shared[0] / shared[1]
        once: dict[str, Any] = {"on_step": True, "on_epoch": False}
        # The name of the epoch's figure, in another hook: of this record the loggers know nothing.
        self.log("train_loss_per_obs", mean, prog_bar=True, logger=False, **once)
        if due:
            self.log("train_loss_per_obs_step", mean, batch_size=1, **once)

    def _log_steps(self, steps: list[StepResult | None]) -> torch.Tensor | None:
        """Log what each of several steps of a batch would have logged; returns their mean loss.

        None stands for a step that was skipped.
        """
        first, every = self.trainer.global_step - len(steps), self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        numbers = [first + place for place, step in enumerate(steps) if step is not None]
        results = [step for step in steps if step is not None]
        self._tell_loggers(first, len(steps))
        if not results:
            return None
        losses = torch.stack([result.loss for result in results])
        rows = torch.tensor([result.rows for result in results], device=losses.device)
        whole = torch.tensor([result.whole for result in results], device=losses.device)
        per_obs = losses / torch.where(whole, self._known_size(), rows.clamp(min=1))
        mean = (per_obs * rows).sum() / rows.sum().clamp(min=1)
        self._add_to_epoch(mean, sum(result.rows for result in results))
        self._shown = per_obs[-1]
        # Of the steps that are due Lightning logs the last, and so we do those before.
        due = [n for n in range(first, first + len(steps)) if every and (n + 1) % every == 0]
        for place, number in enumerate(numbers):
            if number not in due:
                continue
            value, name = per_obs[place], "train_loss_per_obs_step"
            if number == due[-1]:
                size = results[place].rows
                if self.trainer.world_size > 1:
                    self._of_step = value, size
                    continue
                self.log(name, value, on_step=True, on_epoch=False, batch_size=size)
                continue
            metrics = {name: float(value), "epoch": self.current_epoch}
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=number)
        return mean * self._known_size()

    def _add_to_epoch(self, per_obs: torch.Tensor, rows: int) -> None:
        total, count = self._epoch or (torch.zeros_like(per_obs), 0)
        self._epoch, self._shown = (total + per_obs * rows, count + rows), per_obs

    def _log_epoch(self) -> None:
        """Log ``train_loss`` and ``train_loss_per_obs`` of the epoch."""
        if self._epoch is None and self._skips and self.trainer.world_size > 1:
            self._epoch = torch.zeros((), device=self.device), 0  # others have trained
        if self._epoch is None:  # a training_step of the user's own may not add to it
            return
        total, rows = self._epoch
        mean = total / max(rows, 1)
        self.log_mean("train_loss", mean * self._known_size(), rows)
        self.log_mean("train_loss_per_obs", mean, rows)

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Have figures logged first."""
        held: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(each, EpochFigures) for each in held):
            held.insert(0, EpochFigures())
        super().setup(stage)

    def on_train_epoch_start(self) -> None:
        """Begin the figures of an epoch."""
        self._epoch = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the step's loss per observation on the progress bar, from the first step on."""
        now = time.monotonic()
        if self._shown is None or now < self._shown_at + _REFRESH or self.trainer.world_size > 1:
            return
        self._shown_at = now
        # The name of the epoch's figure, in another hook: of this record the loggers know nothing.
        name = "train_loss_per_obs"
        self.log(name, self._shown, on_step=True, on_epoch=False, prog_bar=True, logger=False)

    def on_train_epoch_end(self) -> None:
        """End the figures of an epoch."""
        super().on_train_epoch_end()
        self._epoch = None
