"""Draws beside the observations that they predict: shapes, and entries that were not observed."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_lightning.arguments import read_tensor, shortly


def paired(draws: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten draws and target to their observed entries, as floats.

    Entries of the target that are NaN were not observed, and are left out.

    Args:
        draws: ``(S, B, ...)``.
        target: ``(B, ...)``.

    Returns:
        ``(S, entries)`` and ``(entries,)``.

    Raises:
        ValueError: For shapes that do not belong together, no draw, or draws that are NaN.
        TypeError: For what are no tensors of real numbers.

    Example:
        >>> draws, target = paired(torch.zeros(9, 2, 3), torch.zeros(2, 3))
        >>> draws.shape, target.shape
        (torch.Size([9, 6]), torch.Size([6]))
    """
    draws, target = read_tensor(draws, "draws"), read_tensor(target, "target")
    if not draws.dim() or draws.shape[1:] != target.shape or not len(draws):
        raise ValueError(
            f"draws must be (S, *shape of the target), S > 0, got {tuple(draws.shape)} "
            f"for a target of {tuple(target.shape)}"
        )
    # Values of float64 stay so; whole numbers, as of a Categorical, are compared as floats.
    draws, target = (each if each.is_floating_point() else each.float() for each in (draws, target))
    draws, target = draws.reshape(len(draws), -1), target.reshape(-1)
    seen = ~target.isnan()
    if not bool(seen.all()):
        draws, target = draws[:, seen], target[seen]
    missing = int(draws.isnan().any(0).sum())
    if missing:
        raise ValueError(
            f"draws are NaN for {missing} of {len(target)} entries of the target, which have no "
            "rank among them. Look for NaN in what is predicted from, and in the parameters."
        )
    return draws, target


def read_draws(value: Any, name: str) -> dict[str, torch.Tensor]:
    """Read draws by site, as many of each.

    Raises:
        TypeError: For what is no mapping of names to tensors.
        ValueError: For other numbers of draws, or none.

    Example:
        >>> len(read_draws({"mu": torch.zeros(5), "w": torch.zeros(5, 2)}, "posterior")["w"])
        5
    """
    if not isinstance(value, Mapping) or not all(isinstance(site, str) for site in value):
        raise TypeError(f"{name} must be a dict of draws by site, got {shortly(value)}")
    read = {site: read_tensor(draws, f"{name}['{site}']") for site, draws in value.items()}
    counts = {site: draws.shape[0] if draws.dim() else 0 for site, draws in read.items()}
    if 0 in counts.values() or len(set(counts.values())) > 1:
        told = ", ".join(f"{count} of '{site}'" for site, count in counts.items())
        raise ValueError(
            f"{name} must hold equally many draws of each site, one at least, in dimension 0: "
            f"got {told}"
        )
    return read
