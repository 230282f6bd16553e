"""The updates of torch's Adam and SGD as functions of tensors, for a graph of a whole step."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from pyro_lightning._upstream import has_step_hooks
from pyro_lightning.row_optim import RowAdam, RowAdamW

State = dict[str, torch.Tensor]


class Update(NamedTuple):
    """The parameters and the state of an optimizer after a step."""

    value: torch.Tensor
    state: State


def is_served(optimizer: Optimizer) -> bool:
    """Whether a step of an optimizer can be a part of a graph."""
    if type(optimizer) not in (RowAdam, RowAdamW, Adam, AdamW, SGD):
        return False
    if has_step_hooks(optimizer):
        return False  # they would not run
    return not any(group["differentiable"] for group in optimizer.param_groups)


def numbers_of(optimizer: Optimizer, group: Mapping[str, Any]) -> list[float]:
    """Return the hyperparameters that a scheduler may change at each step."""
    if isinstance(optimizer, SGD):
        names = ["lr", "weight_decay", "momentum", "dampening"]
        return [float(group[name]) for name in names]
    return [*(float(group[name]) for name in ("lr", "weight_decay", "eps")), *group["betas"]]


def kind_of(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what of a group another graph is needed for."""
    flags = group["maximize"], bool(group["weight_decay"])
    if isinstance(optimizer, SGD):
        return *flags, bool(group["momentum"]), group["nesterov"]
    return *flags, group["amsgrad"], _decouples(optimizer, group)


def _decouples(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def update(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    value: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    numbers: Sequence[Any],
) -> Update:
    """Take one step of an optimizer, without changing anything in place.

    Args:
        optimizer: One that is served.
        group: A group of it, of which what :func:`kind_of` returns is read.
        value: The parameters.
        grad: Their gradient.
        state: What the optimizer remembers of them, by torch's names; empty before the first step
            of SGD.
        numbers: What :func:`numbers_of` returns, or scalar tensors of that.
    """
    if group["maximize"]:
        grad = -grad
    if isinstance(optimizer, SGD):
        return _sgd(group, value, grad, state, numbers)
    return _adam(group, value, grad, state, numbers, _decouples(optimizer, group))


def _adam(
    group: Mapping[str, Any],
    value: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    numbers: Sequence[Any],
    decoupled: bool,
) -> Update:
    """Kingma and Ba 2015, algorithm 1; AdamW of Loshchilov and Hutter 2019, algorithm 2."""
    lr, decay, eps, beta1, beta2 = numbers
    if group["weight_decay"] and decoupled:
        value = value * (1 - lr * decay)
    elif group["weight_decay"]:
        grad = grad + decay * value
    step = state["step"] + 1
    mean = state["exp_avg"] + (1 - beta1) * (grad - state["exp_avg"])
    square = state["exp_avg_sq"] * beta2 + (1 - beta2) * grad * grad
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    largest = square
    if group["amsgrad"]:
        largest = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
    # A row's count stands beside its values; a count of them all is a scalar.
    count = step.to(value.dtype).reshape(*step.shape, *[1] * (value.dim() - step.dim()))
    denominator = largest.sqrt() / (1 - beta2**count).sqrt() + eps
    return Update(value - lr / (1 - beta1**count) * mean / denominator, new)


def _sgd(
    group: Mapping[str, Any],
    value: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    numbers: Sequence[Any],
) -> Update:
    """Sutskever et al. 2013, in torch's form: the learning rate stands outside the momentum."""
    lr, decay, momentum, dampening = numbers
    if group["weight_decay"]:
        grad = grad + decay * value
    new: State = {}
    if group["momentum"]:
        buffer = momentum * state["momentum_buffer"] + (1 - dampening) * grad
        new["momentum_buffer"] = buffer
        grad = grad + momentum * buffer if group["nesterov"] else buffer
    return Update(value - lr * grad, new)


def state_names(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str]:
    """Name what an optimizer remembers of each parameter."""
    if isinstance(optimizer, SGD):
        return ["momentum_buffer"] if group["momentum"] else []
    return ["step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
