"""The updates of torch's Adam and SGD as functions of tensors, for a graph of a whole step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from pyro_lightning.row_optim import RowAdam, RowAdamW

State = dict[str, torch.Tensor]


class Update(NamedTuple):
    """The parameters and the state of an optimizer after a step."""

    value: torch.Tensor
    state: State


def is_served(optimizer: Optimizer) -> bool:
    """Whether a step of an optimizer can be a part of a graph."""
    if type(optimizer) in (RowAdam, RowAdamW, Adam, AdamW, SGD):
        return not any(group["differentiable"] for group in optimizer.param_groups)
    return False


def update(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    value: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    lr: torch.Tensor,
) -> Update:
    """Take one step of an optimizer, without changing anything in place.

    Args:
        optimizer: One that is served.
        group: Its hyperparameters; ``lr`` is not read from there.
        value: The parameters.
        grad: Their gradient.
        state: What the optimizer remembers of them, by torch's names; empty before the first step
            of SGD.
        lr: The learning rate, a scalar tensor.
    """
    if group["maximize"]:
        grad = -grad
    if isinstance(optimizer, SGD):
        return _sgd(group, value, grad, state, lr)
    decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, AdamW))
    return _adam(group, value, grad, state, lr, decoupled)


def _adam(
    group: Mapping[str, Any],
    value: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    lr: torch.Tensor,
    decoupled: bool,
) -> Update:
    """Kingma and Ba 2015, algorithm 1; AdamW of Loshchilov and Hutter 2019, algorithm 2."""
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    if decay and decoupled:
        value = value * (1 - lr * decay)
    elif decay:
        grad = grad + decay * value
    step = state["step"] + 1
    mean = torch.lerp(state["exp_avg"], grad, 1 - beta1)
    square = state["exp_avg_sq"] * beta2 + (1 - beta2) * grad * grad
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    largest = square
    if group["amsgrad"]:
        largest = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
    # A row's count stands beside its values; a count of them all is a scalar.
    count = step.to(value.dtype).reshape(*step.shape, *[1] * (value.dim() - step.dim()))
    denominator = largest.sqrt() / (1 - beta2**count).sqrt() + group["eps"]
    return Update(value - lr / (1 - beta1**count) * mean / denominator, new)


def _sgd(
    group: Mapping[str, Any],
    value: torch.Tensor,
    grad: torch.Tensor,
    state: State,
    lr: torch.Tensor,
) -> Update:
    """Sutskever et al. 2013, in torch's form: the learning rate stands outside the momentum."""
    if group["weight_decay"]:
        grad = grad + group["weight_decay"] * value
    new: State = {}
    if group["momentum"]:
        momentum = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * grad
        new["momentum_buffer"] = momentum
        grad = grad + group["momentum"] * momentum if group["nesterov"] else momentum
    return Update(value - lr * grad, new)


def state_names(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str]:
    """Name what an optimizer remembers of each parameter."""
    if isinstance(optimizer, SGD):
        return ["momentum_buffer"] if group["momentum"] else []
    return ["step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
