"""Batches that cannot be trained on: an error that names batch and rows, or their skipping."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.optim import LBFGS, Optimizer

from pyro_lightning._lightning import loaders_of
from pyro_lightning.arguments import read_choice
from pyro_lightning.batch_watch import BatchWatch
from pyro_lightning.batches import rows_at_set_up
from pyro_lightning.diagnosis import LOOK_FURTHER, NonFiniteLoss
from pyro_lightning.gather import gather_rows
from pyro_lightning.in_hand import InHand, batches_of
from pyro_lightning.layout import layout_of, of_same_fields, trailing_shapes
from pyro_lightning.logged_steps import LoggedSteps
from pyro_lightning.retold import brief, retell
from pyro_lightning.rows import data_of
from pyro_lightning.skipped import (
    Skipped,
    is_reshuffled,
    rows_of_batch,
    rows_of_epoch,
    unusable_rows,
)
from pyro_lightning.states import kept_state, preserved_state
from pyro_lightning.tracing import NotCompiled
from pyro_lightning.watched import FailedBatch

_Found = TypeVar("_Found")

_WINDOWS = 8  # batches that are tried at set-up

_FIRST_ROWS = "the first rows of the data, in their order, which are run at set-up"

# What no other batch would be spared.
_FATAL = (MemoryError, torch.cuda.OutOfMemoryError, NotCompiled)


class BadBatches(LoggedSteps):
    """Names the batch in an error, or leaves out what cannot be trained on."""

    bad_batches: str = "raise"
    _compiled: Any
    _in_hand: InHand | None = None
    _layouts: dict[tuple[str, int], tuple[Any, dict[str, tuple[int, ...]]]]
    _passes: dict[str, Skipped]
    _rows_per_step: int | None = None
    _set_up_from: Any = None
    _took: bool = False

    def _estimate(self, batch: Any, held_out: bool = False) -> tuple[torch.Tensor, bool]:
        raise NotImplementedError

    def _read_bad_batches(self, bad_batches: str) -> None:
        self.bad_batches = read_choice(bad_batches, "bad_batches", ("raise", "skip"))
        self._layouts, self._passes = {}, {}
        # Here too, so that they count for no state of the model.
        self._in_hand = self._set_up_from = None
        self._unusable, self._took = 0.0, False

    @property
    def _skips(self) -> bool:
        return self.bad_batches == "skip"

    # -- set-up --------------------------------------------------------------------------------

    def configure_callbacks(self) -> Any:
        """Add what watches the loaders; a subclass's own hook adds to this list."""
        held: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        mine = [] if any(isinstance(each, BatchWatch) for each in held) else [BatchWatch()]
        others: Any = super().configure_callbacks()
        return [*others, *mine]

    def setup(self, stage: str) -> None:
        """Forget what batches looked like; see that they are watched."""
        held: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self._skips and not any(isinstance(each, BatchWatch) for each in held):
            raise RuntimeError(
                "configure_callbacks of this subclass leaves out what counts skipped batches. Let "
                "it return [*super().configure_callbacks(), ...]."
            )
        self._layouts.clear()
        if stage == "fit":
            self._unusable = 0.0
        try:
            super().setup(stage)
        finally:
            self._set_up_from = None

    def _first_batch(self, loader: Any, start: int = 0) -> Any:
        self._set_up_from = loader
        try:
            return super()._first_batch(loader)
        except Exception as error:
            for start in self._other_starts():
                try:
                    return super()._first_batch(loader, start)
                except Exception:
                    continue  # the first is told
            retell(error, _FIRST_ROWS)

    def _initialise(self, batch: Any) -> None:
        initialised = self._initialised
        try:
            super()._initialise(batch)
        except Exception as error:
            self._initialised = initialised  # by the batches before
            if not self._initialise_otherwise():
                if self._set_up_from is None or not isinstance(error, NonFiniteLoss):
                    raise
                retell(error, _FIRST_ROWS)
        loader = self._set_up_from
        alone = loader is not None and not isinstance(loader, Mapping | tuple | list)
        if alone and self.trainer.training:
            self._keep_layout("training", 0, self._prototype)

    def _initialise_otherwise(self) -> bool:
        """Try other batches than the first for set-up, where bad ones are skipped."""
        for start in self._other_starts():
            try:
                with preserved_state(self):
                    batch = super()._first_batch(self._set_up_from, start)
                super()._initialise(batch)
            except Exception:
                continue  # the error of the first batch is told
            return True
        return False

    def _other_starts(self) -> list[int]:
        rows = rows_at_set_up(self._set_up_from) if self._skips else None
        if rows is None:
            return []
        starts = (len(rows) * window // _WINDOWS for window in range(1, _WINDOWS))
        return sorted({start for start in starts if 0 < start < len(rows) - 1})

    # -- batches -------------------------------------------------------------------------------

    def _begin(self) -> int:
        """Look at the batch in hand before it is run.

        Returns:
            How many steps of the optimizer are left out with it; 0 where it is run.
        """
        hand = self._in_hand
        assert hand is not None
        if not self._skips:
            self._compare(hand)
            return 0
        rows = None
        counts = self._passes.setdefault(hand.stage, Skipped())
        try:
            if isinstance(hand.batch, FailedBatch):
                raise hand.batch.error
            rows = self.num_rows(data_of(hand.batch))
            self._compare(hand)
        except Exception as error:
            if rows is None:
                loader = loaders_of(self.trainer, hand.stage)[hand.loader]
                count = batches_of(self.trainer, hand.stage, hand.loader)
                rows = rows_of_batch(loader, hand.number, count)
            steps = self._steps_of(rows) if hand.stage == "training" else 1
            real = self._real_rows(rows, hand.number, hand.loader)
            counts.seen += real
            self._leave_out(error, real, steps)
            return steps
        counts.seen += self._real_rows(rows, hand.number, hand.loader)
        return 0

    def _steps_of(self, rows: int) -> int:
        """Count the steps of a batch; K before there was one."""
        return -(-rows // self._rows_per_step) if self._rows_per_step else self.steps_per_batch

    def _compare(self, hand: InHand) -> None:
        """Check that a batch is laid out as the first of its loader.

        Raises:
            ValueError: Naming what differs.
        """
        if not self._checks:
            return
        key = hand.stage, hand.loader
        if key not in self._layouts:
            alone = hand.stage != "training" or len(loaders_of(self.trainer, hand.stage)) == 1
            if alone:  # of several, one that is through may give nothing
                self._keep_layout(*key, hand.batch)
        elif not of_same_fields(layout_of(hand.batch), self._layouts[key][0]):
            raise ValueError(
                "the batch is not laid out as the first one. Let the data set give each row the "
                "same elements, of the same types and numbers of dimensions; if it is meant so, "
                "PyroSVIModule(..., checks=False)."
            )

    def _keep_layout(self, stage: str, loader: int, batch: Any) -> None:
        self._layouts[stage, loader] = layout_of(batch), trailing_shapes(batch)

    def _attempt(self, run: Callable[[], _Found], rows: int) -> _Found | None:
        """Run a batch; returns None where that fails and bad batches are skipped.

        All is then as it was before: random numbers, buffers, running averages.

        Args:
            run: What runs it.
            rows: B; 0 for a batch of repeated rows alone.
        """
        if not self._skips:
            return run()
        put_back = self._kept()
        try:
            found = run()
        except Exception as error:
            if self._is_fatal(error):
                raise
            put_back()
            self._leave_out(error, rows)
            return None
        self._took |= rows > 0 and bool(self.trainer.training)
        return found

    def _kept(self) -> Any:
        put_back = kept_state(self)
        averages = None if self._baselines is None else dict(self._baselines.averages)

        def all_back() -> None:
            put_back()
            if self._baselines is not None and averages is not None:
                self._baselines.averages = averages

        return all_back

    def _is_fatal(self, error: Exception) -> bool:
        """Whether no batch is to blame for an error."""
        return isinstance(error, _FATAL) or not all(
            bool(torch.isfinite(parameter).all()) for parameter in self.parameters()
        )

    def _leave_out(self, error: Exception, rows: int, batches: int = 1) -> None:
        """Count what is skipped, a batch in hand or a part of it."""
        hand = self._in_hand
        assert hand is not None
        if not rows:  # repeated ones alone, of which each counts where it came first
            return
        where, more = hand.told(error)
        counts = self._passes.setdefault(hand.stage, Skipped())
        loader: Any = self.trainer.train_dataloader
        at_fault = getattr(error, "rows", None)
        unusable = unusable_rows(rows, at_fault, is_reshuffled(loader))
        cause = f"{where}: {brief(error).removesuffix(LOOK_FURTHER).strip()}{more}"
        counts.add(rows, batches, unusable, cause)
        # Compiled code has N for a constant, and ranks must agree: they wait for the epoch's end.
        if hand.stage == "training" and self._compiled is None and self.trainer.world_size == 1:
            of_epoch = rows_of_epoch(loader, self.trainer.num_training_batches)
            if of_epoch is not None:
                self._unusable = max(self._unusable, counts.share(of_epoch))

    def _without_step(self) -> torch.Tensor | None:
        """Return what a training step returns that takes none.

        Other processes wait for this one's gradients, which are zero. ``LBFGS`` needs a loss, and
        moves nothing where the gradient is zero.
        """
        waits = any(isinstance(each, LBFGS) for each in self.trainer.optimizers)
        return self._zero() if waits or self.trainer.world_size > 1 else None

    def _zero(self) -> torch.Tensor:
        """Return a loss of which all parameters have a gradient of zero, but those of rows none."""
        tables = {id(table.parameter): table.dim for table in self._per_row()}
        zero = torch.zeros((), device=self.device)
        for parameter in self.parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in tables:
                none = torch.empty(0, dtype=torch.long, device=parameter.device)
                zero = zero + gather_rows(parameter, none, tables[id(parameter)]).sum()
            else:
                zero = zero + (parameter * 0).sum()
        return zero

    # -- hooks ---------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Let no parameter move where no process has a batch to train on."""
        super().on_before_optimizer_step(optimizer)
        if not self._skips or self.trainer.world_size == 1:
            return
        took = torch.tensor(float(self._took), device=self.device)
        distributed.all_reduce(took, op=distributed.ReduceOp.MAX)
        self._took = False
        if not took:
            optimizer.zero_grad()
