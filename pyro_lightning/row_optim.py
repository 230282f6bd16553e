"""Optimizers that move a row's parameters only in steps whose batch holds the row."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, SparseAdam

from pyro_lightning.arguments import read_flag, read_fraction, read_number, shortly


class _RowStep:
    """Steps rows of sparse gradients one by one in count, everything else as torch does."""

    param_groups: list[dict[str, Any]]
    state: Any

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        # torch compares what it is given with 0, and says no name where that fails.
        params = _read_parameters(params)
        given = signature(super().__init__).bind(params, *args, **kwargs).arguments
        for name in ("lr", "eps", "weight_decay"):
            if name in given:
                read_number(given[name], name)
        for name in ("amsgrad", "maximize"):
            if name in given:
                read_flag(given[name], name)
        betas = given.get("betas", (0.9, 0.999))
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers in [0, 1), got {shortly(betas)}")
        for number, beta in enumerate(betas):
            read_fraction(beta, f"betas[{number}]")
        # As jsonargparse reads it, to know what else a command line may give.
        super().__init__(params, *args, **kwargs)  # type: ignore[call-arg]

    def step(self, closure: Any = None) -> Any:
        """Take a step; ``closure`` computes loss and gradients anew."""
        sparse: list[tuple[torch.Tensor, torch.Tensor]] = []

        def rows_first() -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        grad = parameter.grad
                        if grad is not None and grad.is_sparse:
                            # Later releases of torch have it in Adam, too, and set it for AdamW.
                            kind = isinstance(self, AdamW)
                            decoupled = group.get("decoupled_weight_decay", kind)
                            adam_rows_(parameter, grad, self.state[parameter], group, decoupled)
                            # torch's own step passes over what has no gradient.
                            sparse.append((parameter, grad))
                            parameter.grad = None
            return loss

        try:
            return super().step(rows_first)  # type: ignore[misc]
        finally:
            for parameter, grad in sparse:
                parameter.grad = grad

    # torch wraps a class's step with its hooks unless it is marked so; they stand around the step
    # that this one calls, and would run twice.
    step.hooked = True  # type: ignore[attr-defined]


def _read_parameters(params: Any) -> list[Any]:
    """Read tensors, groups, or tensors with names.

    Raises:
        TypeError: For anything else.
    """
    listed = isinstance(params, Iterable) and not isinstance(params, str | bytes | torch.Tensor)
    found = list(params) if listed else [params]
    for each in found:
        tensor = each[1] if isinstance(each, tuple) and len(each) == 2 else each
        group = isinstance(tensor, dict) and "params" in tensor
        if not listed or not (group or isinstance(tensor, torch.Tensor)):
            raise TypeError(
                f"params must be an iterable of parameters or groups, got {shortly(params)}"
            )
    return found


class RowAdam(_RowStep, Adam):
    r"""``torch.optim.Adam`` with a state of its own for each row of a per-row parameter.

    A row that is in the batch for the t-th time, with gradient g, moves as by Adam's t-th step:

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \eta \, \frac{m / (1 - \beta_1^t)}
        {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Other rows stay as they are, with their moments: dense Adam would move them by momentum. A step
    costs O(B), not O(N). :class:`PyroSVIModule` uses it in place of ``Adam`` where a guide has
    parameters of rows; arguments are those of ``Adam``.

    Example:
        >>> from pyro_lightning.gather import gather_rows
        >>> table = torch.nn.Parameter(torch.zeros(1000))
        >>> optimizer = RowAdam([table], lr=0.1)
        >>> gather_rows(table, torch.tensor([3, 7])).sum().backward()
        >>> optimizer.step()
        >>> table.detach().nonzero().flatten(), round(float(table.detach()[3]), 4)
        (tensor([3, 7]), -0.1)

    Source: Kingma and Ba 2015, "Adam", algorithm 1, row by row.
    """


class RowAdamW(_RowStep, AdamW):
    """``torch.optim.AdamW`` with a state of its own for each row; see :class:`RowAdam`.

    Weight decay, too, touches a row only in steps whose batch holds it.
    """


def adam_rows_(
    parameter: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    decoupled: bool = False,
) -> None:
    """Step the rows of a sparse gradient by Adam, in place.

    Args:
        parameter: The table.
        grad: Its sparse gradient; rows that occur twice are added up.
        state: The optimizer's state of the parameter, made at its first step.
        group: Hyperparameters as ``torch.optim.Adam`` keeps them.
        decoupled: Whether weight decay is that of ``AdamW``.
    """
    grad = grad.coalesce()
    at = tuple(grad.indices())
    g = grad.values()
    if group["maximize"]:
        g = -g
    if not state:
        counted = parameter.shape[: grad.sparse_dim()]
        state["step"] = torch.zeros(counted, dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(parameter)
    # Torch and Lightning leave the steps of a checkpoint on the CPU, where Adam keeps its own.
    state["step"] = state["step"].to(parameter.device)
    (beta1, beta2), lr = group["betas"], group["lr"]
    value = parameter[at]
    if group["weight_decay"] and decoupled:
        value = value * (1 - lr * group["weight_decay"])
    elif group["weight_decay"]:
        g = g + group["weight_decay"] * value
    step = state["step"][at] + 1
    mean = torch.lerp(g, state["exp_avg"][at], beta1)
    square = state["exp_avg_sq"][at] * beta2 + (1 - beta2) * g * g
    state["step"][at], state["exp_avg"][at], state["exp_avg_sq"][at] = step, mean, square
    if group["amsgrad"]:
        square = torch.maximum(state["max_exp_avg_sq"][at], square)
        state["max_exp_avg_sq"][at] = square
    # In half precision 0.999 is 1, and 1 - 0.999**t would be 0.
    exact = step.to(torch.promote_types(g.dtype, torch.float32))
    count = exact.reshape(-1, *[1] * (g.dim() - 1))
    of_mean, of_square = ((1 - beta**count).to(g.dtype) for beta in (beta1, beta2))
    denominator = (square / of_square).sqrt() + group["eps"]
    parameter[at] = value - lr * (mean / of_mean) / denominator


def rowwise(optimizer: Optimizer, tables: Collection[torch.Tensor]) -> Optimizer:
    """Return an optimizer of the same groups that steps tables of rows row by row.

    Args:
        optimizer: What the user made of all parameters.
        tables: The parameters with one entry for each row.

    Raises:
        TypeError: For an optimizer without such a form, naming those that have one.
    """
    if not tables or isinstance(optimizer, _RowStep | SparseAdam):
        return optimizer
    if isinstance(optimizer, SGD | Adagrad) and not any(
        group.get("momentum") or group["weight_decay"] for group in optimizer.param_groups
    ):
        return optimizer
    for kind, own in ((AdamW, RowAdamW), (Adam, RowAdam)):
        if type(optimizer) is kind:
            if any(group["differentiable"] for group in optimizer.param_groups):
                break
            return own(optimizer.param_groups)
    raise TypeError(
        f"the guide has parameters for each row, which {type(optimizer).__name__} with these "
        "options would move in steps whose batch does not hold the row, at a cost of O(N) a step. "
        "Use Adam, AdamW, SparseAdam, Adagrad without weight decay, or SGD without momentum and "
        "weight decay, all of torch.optim."
    )


@contextmanager
def dense_stand_ins(optimizer: Optimizer) -> Iterator[None]:
    """Show an optimizer's sparse gradients as dense ones of the rows alone, for clipping.

    Clipping changes gradients in place, and torch's does not know sparse ones.
    """
    kept = [list(group["params"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [_stand_in(parameter) for parameter in group["params"]]
    try:
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = parameters


def _stand_in(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.grad is None or not parameter.grad.is_sparse:
        return parameter
    parameter.grad = parameter.grad.coalesce()  # a row that is there twice has one gradient
    values = parameter.grad.values()
    shown = torch.empty_like(values)
    shown.grad = values
    return shown
