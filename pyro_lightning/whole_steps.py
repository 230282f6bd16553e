"""When a whole step may be one compiled call, and such a step under automatic optimization."""

from typing import Any

import torch
from lightning.pytorch import Callback

from pyro_lightning._upstream import has_gradient_hooks
from pyro_lightning.closures import is_library
from pyro_lightning.compiled import CompiledLoss, asks_for_cuda_graphs
from pyro_lightning.figures import StepResult
from pyro_lightning.interrupts import Interrupts
from pyro_lightning.parts import has_repeats

# What runs between loss and update, of the module and of callbacks.
_BETWEEN = (
    *("on_before_zero_grad", "on_before_backward", "on_after_backward"),
    "on_before_optimizer_step",
)
# What of the module may do more than Lightning's own, or look at gradients.
_OF_MODULE = (
    *(*_BETWEEN, "training_step", "backward", "optimizer_step", "optimizer_zero_grad"),
    *("loss", "batch_weight", "configure_gradient_clipping"),
)


class WholeSteps(Interrupts):
    """Takes steps of which loss, gradients and update are one compiled call."""

    _compiled: CompiledLoss | None
    _whole: bool = True
    _stepped: bool = False

    def batch_weight(self, batch: Any) -> float:
        """What multiplies a batch's loss in training."""
        raise NotImplementedError

    def _explain(self, batch: Any, loss: torch.Tensor) -> None:
        raise NotImplementedError

    def _may_fuse(self) -> bool:
        """Whether nothing needs the gradients of a step, or what stands between loss and update."""
        # Several processes average gradients, and a scaler looks at them.
        if not self._initialised or self.trainer.world_size > 1:
            return False
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            return False
        # Hooks of parameters, as loggers' watch(model) sets them, are called with gradients.
        # The optimizer lists them in a fraction of the time that ``self.parameters()`` takes.
        groups = [group for each in self.trainer.optimizers for group in each.param_groups]
        if any(has_gradient_hooks(p) for group in groups for p in group["params"]):
            return False
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        mine = (getattr(type(self), name).__module__ for name in _OF_MODULE)
        return all(map(is_library, mine)) and not any(
            getattr(type(each), name) is not getattr(Callback, name)
            for each in callbacks
            for name in _BETWEEN
        )

    # -- one step, under automatic optimization --------------------------------------------------
    def _step_at_once(self, batch: Any) -> tuple[torch.Tensor, StepResult] | None:
        """Take a whole step on a batch; returns its weighted loss, and what it logs.

        None where loss and gradients are to be computed.
        """
        compiled, trainer = self._compiled, self.trainer
        # torch makes no CUDA graph of a graph that changes its inputs, as a whole step does.
        if compiled is None or asks_for_cuda_graphs(compiled.options):
            return None
        if trainer.accumulate_grad_batches > 1 or trainer.gradient_clip_val or not self._may_fuse():
            return None
        if has_repeats(batch):
            return None
        optimizer: Any = self.optimizers()
        fused = compiled.step(self, batch, optimizer.optimizer)
        if fused is None:
            return None
        weight = self.batch_weight(batch) if self._whole else 1.0
        try:
            inputs = fused.inputs
            self._fit_state.updates = True
            with torch.no_grad():
                loss = fused.step(inputs.rows, inputs.flat.tensors, weight)
        finally:
            fused.finish()
        if not torch.isfinite(loss):
            self._fit_state.updates = False  # nothing has moved
            self._explain(batch, loss)
        self._stepped = True
        return loss * weight, StepResult(loss, inputs.batch_size, self._whole)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients, but of a step that is done: its update was part of the loss's call.

        Parameters have no gradient then, so that the optimizer, which Lightning calls next, leaves
        them as they are.
        """
        if self._stepped:
            self._stepped = False
        else:
            super().backward(loss, *args, **kwargs)
