"""Several optimizer steps in one training step of Lightning's."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import distributed
from torch.optim import Optimizer

from pyro_lightning._lightning import count_optimizer_steps
from pyro_lightning.figures import StepResult
from pyro_lightning.fused import FusedStep
from pyro_lightning.inputs import flatten
from pyro_lightning.parts import Parts
from pyro_lightning.rows import checked_rows, data_of
from pyro_lightning.runs import Runs
from pyro_lightning.states import kept_tensors
from pyro_lightning.step_checks import (
    check_parts,
    refuse_checkpoints,
    refuse_hooks,
    refuse_lr_finder,
    warn_of_shifted,
)
from pyro_lightning.whole_steps import WholeSteps


class ManySteps(WholeSteps):
    """Cuts a batch of the loader into mini-batches, and takes an optimizer step on each."""

    steps_per_batch: int
    _rows_per_step: int | None = None

    def setup(self, stage: str) -> None:
        """Refuse what goes with automatic optimization only; get ready, as ever."""
        if stage == "fit" and self.steps_per_batch > 1:
            refuse_hooks(self, self.steps_per_batch)
            refuse_checkpoints(self.trainer, self.steps_per_batch)
            refuse_lr_finder(self.trainer, self.steps_per_batch)
        super().setup(stage)

    def _weighted_loss(self, batch: Any, rows: int) -> tuple[torch.Tensor, StepResult]:
        """Estimate what a step differentiates, and what it logs.

        Args:
            batch: A batch.
            rows: B; 0 for a batch of repeated rows alone, which weighs nothing.
        """
        if not rows:
            loss, nothing = self._loss_of_repeats(batch)
            return nothing, StepResult(loss, 0, self._whole)
        loss, whole = self._estimate(batch)
        weighted = loss * self.batch_weight(batch) if whole else loss
        return weighted, StepResult(loss.detach(), rows, whole)

    def _step_or_loss(self, batch: Any, rows: int) -> tuple[torch.Tensor, StepResult]:
        """Take a whole step where that can be, or estimate what one differentiates."""
        done = self._step_at_once(batch) if rows else None
        return done or self._weighted_loss(batch, rows)

    def _take_steps(self, batch: Any, real: Any, rows: int) -> list[StepResult | None]:
        """Take the optimizer steps of a batch of the loader, one for each mini-batch in it.

        Args:
            batch: The batch, repeated rows among its last: every rank takes as many steps.
            real: The batch without them.
            rows: How many rows that leaves.

        Returns:
            The result of each, None for one that was skipped.
        """
        optimizer: Any = self.optimizers()
        assert self._rows_per_step is not None
        whole = Parts(batch, self.num_rows(data_of(batch)), self._rows_per_step)
        parts = Parts(real, rows, self._rows_per_step)
        if type(self).num_rows is not Runs.num_rows:
            check_parts(self, parts)
        count = self._most_of_ranks(len(whole))
        warn_of_shifted(self.trainer, count, self.steps_per_batch)
        if self.trainer.max_steps >= 0:
            count = min(count, self.trainer.max_steps - self.trainer.global_step)
        results: list[StepResult | None] = []
        before = int(self.trainer.fit_loop.epoch_loop.batch_idx) * self.steps_per_batch
        while (done := len(results)) < count:
            self._at_part(done)
            if done >= len(whole):  # other ranks have rows for a step, and this one has none
                self._pass_over_step(optimizer, before + done)
                self._step_schedulers("step", before + done)
                results.append(None)
                continue
            if done >= len(parts):
                results.append(self._take_step(whole[done], optimizer, before + done, repeats=True))
                self._step_schedulers("step", before + done)
                continue
            fused = self._fused(parts, done, optimizer.optimizer)
            if fused is None:
                results.append(self._take_step(parts[done], optimizer, before + done))
                self._step_schedulers("step", before + done)
            else:
                # The last part may have another size, and with it another program.
                size = parts.rows_of(done)
                alike = list(
                    takewhile(
                        lambda n, size=size: parts.rows_of(n) == size and not parts.repeats(n),  # type: ignore[misc]
                        range(done, min(count, len(parts))),
                    )
                )
                results += self._take_fused(fused, parts, alike, before)
                if len(results) == done:  # arguments that are never the same twice
                    results.append(self._take_step(parts[done], optimizer, before + done))
                    self._step_schedulers("step", before + done)
        self._at_part(None)
        if all(result is not None for result in results):
            if rows:
                self._mark_rows(real)
        else:
            for number, result in enumerate(results[: len(parts)]):
                if result is not None:
                    self._mark_rows(parts[number])
        return results

    def _most_of_ranks(self, steps: int) -> int:
        """Return the steps of the rank that takes most in this batch, for which all others wait."""
        if self.trainer.world_size == 1 or self._rows_of_ranks.alike:
            return steps
        most = torch.tensor(steps, device=self.device)
        distributed.all_reduce(most, op=distributed.ReduceOp.MAX)
        return int(most)

    def _at_part(self, number: int | None) -> None:
        if self._in_hand is not None:
            self._in_hand.part = number

    def _take_step(
        self, part: Any, optimizer: Any, index: int, repeats: bool = False
    ) -> StepResult | None:
        """Take a step; returns its result, None where it is skipped."""
        self._set_kl_weight()
        rows = 0 if repeats else self.num_rows(data_of(part))
        loss_of = partial(self._weighted_loss, part, rows)
        # Before the optimizer is called, which could not be told to leave a step out. Its first
        # call of the closure gets this loss; one that calls it again has begun to train.
        tried = [self._attempt(loss_of, rows)] if self._skips else []
        if None in tried:
            self._pass_over_step(optimizer, index)
            return None
        results: list[StepResult] = []

        def weighted() -> torch.Tensor:
            loss, result = (tried.pop() if tried else None) or loss_of()
            results.append(result)
            return loss

        self._step(optimizer, index, weighted)
        if not results:
            raise RuntimeError(
                f"{type(self).__name__}.optimizer_step did not compute the loss: call "
                "optimizer.step(closure=optimizer_closure), or optimizer_closure()"
            )
        return results[-1]

    def _step(self, optimizer: Any, index: int, loss_of: Callable[[], torch.Tensor]) -> None:
        """Take a step through the hooks of automatic optimization, in their order."""

        @torch.enable_grad()
        def closure() -> torch.Tensor:
            loss = loss_of()
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_before_zero_grad(self.trainer, self, optimizer.optimizer)
            self.on_before_zero_grad(optimizer.optimizer)
            self.optimizer_zero_grad(self.current_epoch, index, optimizer.optimizer)
            self.manual_backward(loss)
            return loss.detach()

        done = self.trainer.global_step
        self.optimizer_step(self.current_epoch, index, optimizer, closure)
        # One that the user's hook leaves out counts as well, as it does for Lightning.
        count_optimizer_steps(self.trainer, done + 1 - self.trainer.global_step)

    def _pass_over(self, steps: int) -> torch.Tensor | None:
        """Return what a training step returns that takes none; count as many as it would take."""
        if self.steps_per_batch == 1:
            return self._without_step()
        steps = self._most_of_ranks(steps)
        if self.trainer.max_steps >= 0:
            steps = min(steps, self.trainer.max_steps - self.trainer.global_step)
        before = int(self.trainer.fit_loop.epoch_loop.batch_idx) * self.steps_per_batch
        optimizer: Any = self.optimizers()
        for index in range(before, before + steps):
            self._pass_over_step(optimizer, index)
            self._step_schedulers("step", index)
        return None

    def _pass_over_step(self, optimizer: Any, index: int) -> None:
        """Count a step that is not taken, as Lightning does; take part in those of other ranks."""
        if self.trainer.world_size == 1:
            count_optimizer_steps(self.trainer, 1)
        else:
            self._step(optimizer, index, self._zero)

    # -- whole steps, compiled -------------------------------------------------------------------
    def _fused(self, parts: Parts, number: int, optimizer: Optimizer) -> FusedStep | None:
        if self._compiled is None or not self._may_fuse() or parts.repeats(number):
            return None
        return self._compiled.step(self, parts[number], optimizer)

    def _take_fused(
        self, fused: FusedStep, parts: Parts, numbers: list[int], before: int
    ) -> list[StepResult | None]:
        losses: list[torch.Tensor] = []
        self.zero_grad()  # those of an eager step before
        weight = self.batch_weight(parts[numbers[0]]) if self._whole else 1.0
        inputs = self._inputs_of(parts, numbers)
        fused.scheduled = bool(self.trainer.lr_scheduler_configs)
        known: Any = None
        self._fit_state.updates = True
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
                    self._set_kl_weight()
                    put_back = kept_tensors(self) if self._skips else None
                    losses.append(fused.step(rows, given, weight))
                    if put_back is not None and not torch.isfinite(losses[-1]):
                        put_back()  # before the next step, which draws and reads them
                    count_optimizer_steps(self.trainer, 1)
                    if fused.scheduled:
                        self._step_schedulers("step", before + number)
        finally:
            fused.finish()
        finite = torch.isfinite(torch.stack(losses)).tolist() if losses else []
        taken: list[StepResult | None] = [
            StepResult(loss, parts.rows_of(numbers[0]), self._whole) for loss in losses
        ]
        for place, fine in enumerate(finite):
            if not fine:  # its step has moved no parameter
                self._at_part(numbers[place])
                self._explain_or_skip(parts[numbers[place]], losses[place])
                taken[place] = None
        return taken

    def _inputs_of(
        self, parts: Parts, numbers: list[int]
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

    def _explain_or_skip(self, part: Any, loss: torch.Tensor) -> None:
        put_back = self._kept()
        try:
            self._explain(part, loss)
        except ValueError as error:
            if not self._skips or self._is_fatal(error):
                raise
            put_back()
            self._leave_out(error, self.num_rows(data_of(part)))

    def _explain(self, part: Any, loss: torch.Tensor) -> None:
        self._run(part)  # names sites and rows
        raise ValueError(
            f"the loss of a compiled step is {loss.item()}, though not at other random numbers. "
            "Leave compile out to see the site; a too large learning rate does this."
        )

    # -- hooks -----------------------------------------------------------------------------------
    def on_train_epoch_end(self) -> None:
        """Log the epoch; step the schedulers of epochs, where optimization is manual."""
        super().on_train_epoch_end()
        if self.steps_per_batch > 1:
            self._step_schedulers("epoch", self.trainer.current_epoch)
