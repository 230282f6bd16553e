"""Losses and gradients of eager and of compiled code at equal random numbers, compared."""

from typing import Any

import torch

from pyro_lightning.program import Program, StepInputs
from pyro_lightning.states import preserved_state
from pyro_lightning.tracing import Untraceable


def trained(module: Any) -> list[torch.Tensor]:
    """List the parameters that a module trains."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


Result = tuple[torch.Tensor, list[torch.Tensor | None]]


def of_eager(loss: torch.Tensor, parameters: list[torch.Tensor]) -> Result:
    """Return an eager loss and its gradients; it can be differentiated once more."""
    return _differentiated(loss, parameters, retain_graph=True)


def of_program(
    module: Any, program: Program, inputs: StepInputs, parameters: list[torch.Tensor]
) -> Result:
    """Compute loss and gradients of a program; leaves random states as they are."""
    with preserved_state(module):
        return _differentiated(program.loss(inputs), parameters)


def of_graph(
    module: Any, program: Program, inputs: StepInputs, parameters: list[torch.Tensor]
) -> Result:
    """Compute loss and gradients by the operations that were recorded, one by one."""
    with preserved_state(module):
        return _differentiated(program.loss(inputs, program.traced.graph), parameters)


def _differentiated(
    loss: torch.Tensor, parameters: list[torch.Tensor], retain_graph: bool = False
) -> Result:
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=retain_graph)
    return loss.detach(), [None if g is None else _values(g) for g in grads]


def _values(grad: torch.Tensor) -> torch.Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def largest_gradient(result: Result) -> float:
    """Return the largest entry of all gradients."""
    known = [g for g in result[1] if g is not None and g.numel()]
    return max((float(g.abs().max()) for g in known), default=0.0)


def compare(found: Result, expected: Result, what: str, largest: float = 0.0) -> None:
    """Compare losses and gradients, to half the digits of their type.

    A gradient near 0 is the rest of large terms that cancel: it is compared to the rounding of the
    largest gradient as well, or of ``largest``, which it has been: near an optimum all of them are
    such a rest.

    Raises:
        Untraceable: When they differ, saying that ``what`` does.
    """
    (loss, grads), (true_loss, true_grads) = found, expected
    eps = max(torch.finfo(t.dtype).eps for t in (loss, *(g for g in true_grads if g is not None)))
    if torch.is_autocast_enabled(loss.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(loss.device.type)).eps)
    largest = max(largest, largest_gradient(expected))
    pairs = [(loss, true_loss, 0.0)]
    for grad, true in zip(grads, true_grads, strict=True):
        if (grad is None) != (true is None):
            raise Untraceable(f"another parameter has a gradient in {what} than in eager")
        if grad is not None and true is not None and true.numel():
            pairs.append((grad, true, 64 * eps * largest))
    for one, other, allowed in pairs:
        if one.shape != other.shape:
            raise Untraceable(f"a gradient has another shape in {what} than in eager")
        bound = max(eps**0.5 * float(other.abs().max()), allowed)
        if not float((one - other).abs().max()) <= bound:
            raise Untraceable(
                f"{what} differs from eager at the same random numbers on another batch: the model "
                "may read values of its batch into Python, or keep state from call to call"
            )
