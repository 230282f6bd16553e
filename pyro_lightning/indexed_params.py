"""A warning of dense parameters of all rows, of which a batch's data index a few."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn
from torch.optim import SGD, Adadelta, Adagrad, Optimizer, RMSprop, Rprop

from pyro_lightning.params import shown_name
from pyro_lightning.rank_zero import warn

# What has no gradient stays where it is, under these without momentum and weight decay.
_STEADY = (SGD, Adagrad, RMSprop, Adadelta, Rprop)


def indexed_params(
    parameters: Mapping[str, nn.Parameter],
    sizes: Collection[int],
    rows: int,
    losses: Callable[[bool], torch.Tensor],
) -> tuple[str, ...]:
    r"""Name the parameters with one entry for each row of the data set that a batch's data index.

    Such a parameter has a dimension of a size in question, and its gradient is exactly zero there
    but for B entries at most; and for one at most, where every row of the batch is the first.

    .. math:: \#\{i : \partial L / \partial \theta_i \neq 0\} \leq B < N

    Args:
        parameters: The parameters in question, by name.
        sizes: N, and how many rows have a number.
        rows: B.
        losses: Computes the loss of the batch, or of its first row in every row's place.

    Example:
        >>> table, i = nn.Parameter(torch.zeros(9)), torch.tensor([4, 7])
        >>> def losses(repeated):
        ...     return (1 - table[i[:1].expand(2) if repeated else i]).square().sum()
        >>> indexed_params({"table": table}, [9], 2, losses)
        ('table',)
    """
    dims = {
        name: [dim for dim, size in enumerate(parameter.shape) if size in sizes and size > rows]
        for name, parameter in parameters.items()
        if parameter.requires_grad
    }
    suspects = [name for name, found in dims.items() if found]
    for repeated, most in ((False, rows), (True, 1)):
        if not suspects:
            break
        try:
            loss = losses(repeated)
        except (ValueError, RuntimeError):
            # A batch of equal rows is not the user's, and may be one that no model takes: the
            # first batch must do.
            if not repeated:
                raise
            break
        asked = [parameters[name] for name in suspects]
        gradients = torch.autograd.grad(loss, asked, allow_unused=True)
        suspects = [
            name
            for name, gradient in zip(suspects, gradients, strict=True)
            if gradient is not None
            and not gradient.is_sparse
            and any(0 < _touched(gradient, dim) <= most for dim in dims[name])
        ]
    return tuple(suspects)


def _touched(gradient: torch.Tensor, dim: int) -> int:
    """Count the entries along a dimension whose gradient is not zero."""
    return int((gradient.movedim(dim, 0).reshape(gradient.shape[dim], -1) != 0).any(1).sum())


def warn_of_indexed(
    names: Collection[str], parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> None:
    """Warn of an optimizer that moves entries of such parameters in steps without their rows."""
    steady = isinstance(optimizer, _STEADY) and not any(
        group.get("momentum") or group.get("weight_decay") for group in optimizer.param_groups
    )
    if steady or not names:
        return
    shown = ", ".join(
        f"'{shown_name(name)}' (shape {tuple(parameters[name].shape)})" for name in names
    )
    warn(
        f"parameter {shown} has one entry for each row of the data set, which the data of a batch "
        f"index: {type(optimizer).__name__} moves the entries of all other rows, too, at each "
        "step, by the momentum of their last one, and at a cost of O(N). Write pyro.param(name, "
        "value, event_dim=...) inside the data plate, with batches that tell their rows "
        "(ArrayDataModule, IndexedDataset); or use SGD without momentum and weight decay.",
        stacklevel=2,
    )
