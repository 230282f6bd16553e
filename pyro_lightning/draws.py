"""Draws beside the observations that they predict: shapes, and entries that were not observed."""

import torch


def paired(draws: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flatten draws and target to their observed entries, as floats.

    Entries of the target that are NaN were not observed, and are left out.

    Args:
        draws: ``(S, B, ...)``.
        target: ``(B, ...)``.

    Returns:
        ``(S, entries)`` and ``(entries,)``.

    Raises:
        ValueError: For shapes that do not belong together, or no draw.

    Example:
        >>> draws, target = paired(torch.zeros(9, 2, 3), torch.zeros(2, 3))
        >>> draws.shape, target.shape
        (torch.Size([9, 6]), torch.Size([6]))
    """
    if not draws.dim() or draws.shape[1:] != target.shape or not len(draws):
        raise ValueError(
            f"draws must be (S, *shape of the target), S > 0, got {tuple(draws.shape)} "
            f"for a target of {tuple(target.shape)}"
        )
    # Values of float64 stay so; whole numbers, as of a Categorical, are compared as floats.
    draws, target = (each if each.is_floating_point() else each.float() for each in (draws, target))
    draws, target = draws.reshape(len(draws), -1), target.reshape(-1)
    seen = ~target.isnan()
    return (draws, target) if bool(seen.all()) else (draws[:, seen], target[seen])
