"""Several optimizer steps in one training step of Lightning's."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from pyro_lightning._lightning import count_optimizer_steps
from pyro_lightning.batches import map_tensors
from pyro_lightning.compiled import CompiledLoss
from pyro_lightning.fused import FusedStep
from pyro_lightning.inputs import flatten
from pyro_lightning.life_cycle import LifeCycle
from pyro_lightning.rows import IndexedBatch, checked_rows, data_of


class StepResult(NamedTuple):
    """What one of several steps had to log: its loss, B, and whether it is the whole data set's."""

    loss: torch.Tensor
    rows: int
    whole: bool


class ManySteps(LifeCycle):
    """Cuts a batch of the loader into mini-batches, and takes an optimizer step on each."""

    steps_per_batch: int
    _compiled: CompiledLoss | None
    _rows_per_step: int | None = None
    _whole: bool = True

    def batch_weight(self, batch: Any) -> float:
        """What multiplies a batch's loss in training."""
        raise NotImplementedError

    def _estimate(self, batch: Any, held_out: bool = False) -> tuple[torch.Tensor, bool]:
        raise NotImplementedError

    def _take_steps(self, batch: Any) -> list[StepResult]:
        """Take the optimizer steps of a batch of the loader, one for each mini-batch in it."""
        optimizer: Any = self.optimizers()
        assert self._rows_per_step is not None
        parts = cut(batch, self._rows_per_step, self.num_rows(data_of(batch)))
        left = self.trainer.max_steps - self.trainer.global_step
        if self.trainer.max_steps >= 0:
            parts = parts[:left]
        results: list[StepResult] = []
        position = self._steps_before(batch)
        while len(results) < len(parts):
            done = len(results)
            fused = self._fused(parts[done], optimizer.optimizer)
            if fused is None:
                results.append(self._take_step(parts[done], optimizer))
                self._step_schedulers("step", position + done)
            else:
                # Parts of other sizes, of which the last is one, have another program.
                size = self.num_rows(data_of(parts[done]))
                alike = [p for p in parts[done:] if self.num_rows(data_of(p)) == size]
                results += self._take_fused(fused, alike, position + done)
        return results

    def _take_step(self, part: Any, optimizer: Any) -> StepResult:
        loss, whole = self._estimate(part)
        weight = self.batch_weight(part) if whole else 1.0
        self.manual_backward(loss * weight)
        optimizer.step()
        optimizer.zero_grad()
        return StepResult(loss.detach(), self.num_rows(data_of(part)), whole)

    # -- whole steps, compiled -------------------------------------------------------------------
    def _fused(self, part: Any, optimizer: Optimizer) -> FusedStep | None:
        # Several processes average gradients, and a scaler looks at them, between loss and update.
        if self._compiled is None or not self._initialised or self.trainer.world_size > 1:
            return None
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return None
        if isinstance(part, IndexedBatch) and len(torch.unique(part.rows)) < len(part.rows):
            return None
        return self._compiled.step(self, part, optimizer)

    def _take_fused(self, fused: FusedStep, parts: list[Any], position: int) -> list[StepResult]:
        losses: list[torch.Tensor] = []
        weight = self.batch_weight(parts[0]) if self._whole else 1.0
        size = self.num_rows(data_of(parts[0]))
        fused.begin()
        try:
            with torch.no_grad():
                for part in parts:
                    tensors = flatten(self.model_inputs(data_of(part))).tensors
                    rows = None
                    if self._per_row():
                        rows = checked_rows(part, size, self._count_rows(), self._source)
                    losses.append(fused.step(rows, tensors, weight).clone())
                    self._step_schedulers("step", position + len(losses) - 1)
        finally:
            fused.finish()
        count_optimizer_steps(self.trainer, len(losses))
        finite = torch.isfinite(torch.stack(losses)).tolist()
        if not all(finite):
            self._explain(parts[finite.index(False)], losses[finite.index(False)])
        return [StepResult(loss, size, self._whole) for loss in losses]

    def _explain(self, part: Any, loss: torch.Tensor) -> None:
        self._run(part)  # names sites and rows
        raise ValueError(
            f"the loss of a compiled step is {loss.item()}, though not at other random numbers. "
            "Leave compile out to see the site; a too large learning rate does this."
        )

    # -- sizes and schedulers --------------------------------------------------------------------
    def _steps_before(self, batch: Any) -> int:
        """How many steps of this epoch came before this batch of the loader."""
        return int(self.trainer.fit_loop.epoch_loop.batch_idx) * self.steps_per_batch

    def _step_schedulers(self, interval: str, index: int) -> None:
        """Step the schedulers that are due after a step or an epoch, counted from 0.

        Lightning leaves them to the module where optimization is manual.
        """
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or (index + 1) % config.frequency:
                continue
            value = None
            if config.reduce_on_plateau:
                if interval == "step":
                    continue
                value = self.trainer.callback_metrics.get(str(config.monitor))
                if value is None:
                    raise ValueError(
                        f"ReduceLROnPlateau watches '{config.monitor}', which is not logged. "
                        f"Logged are: {', '.join(sorted(self.trainer.callback_metrics))}"
                    )
            self.lr_scheduler_step(config.scheduler, value)

    def on_train_epoch_end(self) -> None:
        """Step the schedulers of epochs, where optimization is manual."""
        if self.steps_per_batch > 1:
            self._step_schedulers("epoch", self.trainer.current_epoch)
            self._log_position(self.trainer.global_step - 1)

    def on_validation_epoch_end(self) -> None:
        """Log the figures of a validation at the optimizer's step."""
        if self.steps_per_batch > 1 and self.trainer.training:
            self._log_position(self.trainer.global_step)

    def _log_position(self, step: int) -> None:
        # Lightning takes a logged "step" for the x-axis in place of its count of loader batches.
        self.log("step", torch.tensor(float(step), dtype=torch.float64))


def cut(batch: Any, size: int, rows: int) -> list[Any]:
    """Cut a batch into mini-batches of successive rows; the last may be smaller.

    Args:
        batch: A batch, with or without row numbers.
        size: Rows of a mini-batch.
        rows: Rows of the batch.

    Example:
        >>> [part["x"].tolist() for part in cut({"x": torch.arange(5)}, 2, 5)]
        [[0, 1], [2, 3], [4]]
    """
    numbers = torch.as_tensor(batch.rows) if isinstance(batch, IndexedBatch) else None
    return list(_parts(data_of(batch), numbers, batch, size, rows))


def _parts(data: Any, numbers: Any, batch: Any, size: int, rows: int) -> Iterator[Any]:
    for start in range(0, rows, size):
        stop = min(start + size, rows)

        def taken(value: torch.Tensor, start: int = start, stop: int = stop) -> torch.Tensor:
            return value[start:stop] if value.dim() and len(value) == rows else value

        part = map_tensors(data, taken)
        if numbers is None:
            yield part
        else:
            source = batch.source
            if isinstance(source, torch.Tensor) and source.dim():
                source = source[start:stop]
            yield type(batch)(part, numbers[start:stop], source)
