"""Several optimizer steps in one training step of Lightning's."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_lightning._lightning import count_optimizer_steps, resumes_fit
from pyro_lightning.batches import map_tensors
from pyro_lightning.closures import is_library
from pyro_lightning.compiled import CompiledLoss
from pyro_lightning.figures import StepResult
from pyro_lightning.fused import FusedStep
from pyro_lightning.inputs import flatten
from pyro_lightning.interrupts import Interrupts
from pyro_lightning.rows import IndexedBatch, checked_rows, data_of
from pyro_lightning.runs import Runs


class ManySteps(Interrupts):
    """Cuts a batch of the loader into mini-batches, and takes an optimizer step on each."""

    steps_per_batch: int
    _compiled: CompiledLoss | None
    _rows_per_step: int | None = None
    _whole: bool = True

    def batch_weight(self, batch: Any) -> float:
        """What multiplies a batch's loss in training."""
        raise NotImplementedError

    def _take_steps(self, batch: Any) -> list[StepResult]:
        """Take the optimizer steps of a batch of the loader, one for each mini-batch in it."""
        optimizer: Any = self.optimizers()
        assert self._rows_per_step is not None
        parts = Parts(batch, self.num_rows(data_of(batch)), self._rows_per_step)
        count = len(parts)
        if self.trainer.max_steps >= 0:
            count = min(count, self.trainer.max_steps - self.trainer.global_step)
        results: list[StepResult] = []
        before = int(self.trainer.fit_loop.epoch_loop.batch_idx) * self.steps_per_batch
        while (done := len(results)) < count:
            fused = self._fused(parts, done, optimizer.optimizer)
            if fused is None:
                results.append(self._take_step(parts[done], optimizer))
                self._step_schedulers("step", before + done)
            else:
                # The last part may have another size, and with it another program.
                size = parts.rows_of(done)
                alike = list(
                    takewhile(
                        lambda n, size=size: parts.rows_of(n) == size and not parts.repeats(n),  # type: ignore[misc]
                        range(done, count),
                    )
                )
                results += self._take_fused(fused, parts, alike, before)
                if len(results) == done:  # arguments that are never the same twice
                    results.append(self._take_step(parts[done], optimizer))
                    self._step_schedulers("step", before + done)
        return results

    def _take_step(self, part: Any, optimizer: Any) -> StepResult:
        loss, whole = self._estimate(part)
        weight = self.batch_weight(part) if whole else 1.0
        self.manual_backward(loss * weight)
        optimizer.step()
        optimizer.zero_grad()
        return StepResult(loss.detach(), self.num_rows(data_of(part)), whole)

    # -- whole steps, compiled -------------------------------------------------------------------
    def _fused(self, parts: "Parts", number: int, optimizer: Optimizer) -> FusedStep | None:
        # Several processes average gradients, and a scaler looks at them, between loss and update.
        if self._compiled is None or not self._initialised or self.trainer.world_size > 1:
            return None
        if self._looks_between():
            return None
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return None
        if parts.repeats(number):
            return None
        return self._compiled.step(self, parts[number], optimizer)

    def _looks_between(self) -> bool:
        """Whether hooks of the user's, or of a callback, run between loss and update."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        between = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")
        mine = [getattr(type(self), name).__module__ for name in (*between, "backward")]
        return any(not is_library(module) for module in mine) or any(
            getattr(type(each), name) is not getattr(Callback, name)
            for each in callbacks
            for name in between
        )

    def _take_fused(
        self, fused: FusedStep, parts: "Parts", numbers: list[int], before: int
    ) -> list[StepResult]:
        losses: list[torch.Tensor] = []
        weight = self.batch_weight(parts[numbers[0]]) if self._whole else 1.0
        inputs = self._inputs_of(parts, numbers)
        fused.scheduled = bool(self.trainer.lr_scheduler_configs)
        known: Any = None
        try:
            with torch.no_grad():
                for number in numbers:
                    rows, given, structure = next(inputs)
                    # Another graph: numbers among the arguments, or in the optimizer.
                    if structure is not known and structure != fused.structure:
                        break
                    if fused.scheduled and not fused.fits():
                        break
                    known = structure
                    losses.append(fused.step(rows, given, weight))
                    count_optimizer_steps(self.trainer, 1)
                    if fused.scheduled:
                        self._step_schedulers("step", before + number)
        finally:
            fused.finish()
        finite = torch.isfinite(torch.stack(losses)).tolist() if losses else []
        if not all(finite):
            first = finite.index(False)
            self._explain(parts[numbers[first]], losses[first])
        return [StepResult(loss, parts.rows_of(numbers[0]), self._whole) for loss in losses]

    def _inputs_of(
        self, parts: "Parts", numbers: list[int]
    ) -> Iterator[tuple[torch.Tensor | None, list[torch.Tensor], Any]]:
        """Yield rows, tensors and structure of parts, cut at once where no hook may change them."""
        rows: Any = None
        if self._keeps_rows:
            rows = checked_rows(parts.batch, parts.rows, self._count_rows(), self._source)
            rows = None if rows is None else rows.split(parts.size)
        data = data_of(parts.batch)
        hooks = type(self).model_inputs, type(self).num_rows
        if hooks != (Runs.model_inputs, Runs.num_rows):
            for number in numbers:
                flat = flatten(self.model_inputs(data_of(parts[number])))
                yield rows and rows[number], flat.tensors, flat.structure
            return
        structure = flatten(self.model_inputs(data_of(parts[numbers[0]]))).structure
        columns = [
            torch.split(tensor, parts.size)
            if tensor.dim() and len(tensor) == parts.rows
            else tensor
            for tensor in flatten(self.model_inputs(data)).tensors
        ]
        for number in numbers:
            cut = [each[number] if isinstance(each, tuple) else each for each in columns]
            yield rows and rows[number], cut, structure

    def _explain(self, part: Any, loss: torch.Tensor) -> None:
        self._run(part)  # names sites and rows
        raise ValueError(
            f"the loss of a compiled step is {loss.item()}, though not at other random numbers. "
            "Leave compile out to see the site; a too large learning rate does this."
        )

    # -- schedulers ----------------------------------------------------------------------------
    def _step_schedulers(self, interval: str, index: int) -> None:
        """Step the schedulers that are due after a step or an epoch, counted from 0.

        Lightning leaves them to the module where optimization is manual.
        """
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or (index + 1) % config.frequency:
                continue
            value = None
            plateau = isinstance(config.scheduler, ReduceLROnPlateau)
            if self._watched.get("reduce_on_plateau", plateau):
                if interval == "step":
                    continue
                monitor = self._watched.get("monitor")
                value = self.trainer.callback_metrics.get(str(monitor))
                if value is None and self._watched.get("strict", True):
                    raise ValueError(
                        f"ReduceLROnPlateau watches '{monitor}', which is not logged. "
                        f"Logged are: {', '.join(sorted(self.trainer.callback_metrics))}"
                    )
                if value is None:
                    continue
            self.lr_scheduler_step(config.scheduler, value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep K, by which batches and steps are counted."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["pyro_lightning_steps_per_batch"] = self.steps_per_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another K than the checkpoint's.

        Raises:
            ValueError: Naming both.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("pyro_lightning_steps_per_batch", self.steps_per_batch)
        if saved != self.steps_per_batch and resumes_fit(self):
            raise ValueError(
                f"the checkpoint is of steps_per_batch={saved}, and this module has "
                f"{self.steps_per_batch}: what is done would be counted wrongly. "
                f"Resume with {saved}, or load the weights alone, by load_state_dict."
            )

    def on_train_epoch_end(self) -> None:
        """Log the epoch; step the schedulers of epochs, where optimization is manual."""
        super().on_train_epoch_end()
        if self.steps_per_batch > 1:
            self._step_schedulers("epoch", self.trainer.current_epoch)


class Parts:
    """The mini-batches of successive rows in a batch; the last may be smaller.

    Args:
        batch: A batch, with or without row numbers.
        rows: Rows of the batch.
        size: Rows of a mini-batch.

    Example:
        >>> [part["x"].tolist() for part in Parts({"x": torch.arange(5)}, rows=5, size=2)]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, batch: Any, rows: int, size: int) -> None:
        self.batch, self.rows, self.size = batch, rows, size
        self._repeats: bool | None = None

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def rows_of(self, number: int) -> int:
        """Count the rows of a mini-batch."""
        return min(self.size, self.rows - number * self.size)

    def repeats(self, number: int) -> bool:
        """Whether a mini-batch holds a row twice; looked at one by one only if the batch does."""
        if self._repeats is None:
            self._repeats = _repeats(self.batch)
        return self._repeats and _repeats(self[number])

    def __getitem__(self, number: int) -> Any:
        if number >= len(self):
            raise IndexError(number)
        start = number * self.size
        stop = start + self.rows_of(number)

        def taken(value: torch.Tensor) -> torch.Tensor:
            return value[start:stop] if value.dim() and len(value) == self.rows else value

        part = map_tensors(data_of(self.batch), taken)
        if not isinstance(self.batch, IndexedBatch):
            return part
        source = self.batch.source
        if isinstance(source, torch.Tensor):
            source = taken(source)
        return type(self.batch)(part, taken(torch.as_tensor(self.batch.rows)), source)


def _repeats(batch: Any) -> bool:
    """Whether a row of parameters of its own comes twice: its gradients add up."""
    if not isinstance(batch, IndexedBatch):
        return False
    rows = torch.as_tensor(batch.rows)
    return len(torch.unique(rows)) < len(rows)
