"""A learning rate in the place of an optimizer's own."""

from typing import Any

import torch


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: Any) -> None:
    """Give the groups of an optimizer a learning rate.

    Args:
        optimizer: The optimizer.
        lr: The rate. None, and what is no number, such as a network that a module holds by this
            name, leaves the optimizer as it is.

    Raises:
        ValueError: When it is not above 0, or when groups have rates of their own, which one would
            level.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(1)], lr=0.1)
        >>> set_learning_rate(adam, 0.02)
        >>> adam.param_groups[0]["lr"]
        0.02
    """
    if not isinstance(lr, int | float) or isinstance(lr, bool):
        return
    if not lr > 0:
        raise ValueError(f"lr, the learning rate of the module, must be above 0, got {lr}")
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) > 1:
        raise ValueError(
            f"the module's lr={lr} would take the place of the learning rates of the optimizer's "
            f"groups, which differ ({', '.join(f'{rate:g}' for rate in sorted(rates))}). Leave it "
            "None, or Tuner.lr_find(..., update_attr=False), and set the rates in optimizer=..."
        )
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
