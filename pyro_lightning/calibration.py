"""Where observations lie among the draws that predict them."""

import torch

from pyro_lightning.arguments import read_count
from pyro_lightning.draws import paired


def pit_bounds(draws: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Bound the probability integral transform of each observation by its rank among S draws.

    .. math:: \Big[\frac{\#\{s: x_s < y\}}{S + 1}, \frac{\#\{s: x_s \le y\} + 1}{S + 1}\Big]

    A number drawn uniformly between the two is uniform in [0, 1] where the observation is
    distributed as its draws, whatever S is, and for counts as well.

    Args:
        draws: ``(S, B, ...)``.
        target: ``(B, ...)``; entries that are NaN are left out.

    Returns:
        Lower and upper bounds, ``(entries,)`` each, in float64.

    Raises:
        ValueError: For shapes that do not belong together.

    Example:
        >>> lower, upper = pit_bounds(torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([2.0]))
        >>> lower.item(), upper.item()
        (0.25, 1.0)

    Source: Czado, Gneiting and Held 2009, "Predictive model assessment for count data".
    """
    flat, observed = paired(draws, target)
    below, up_to = (flat < observed).double().sum(0), (flat <= observed).double().sum(0)
    return below / (len(flat) + 1), (up_to + 1) / (len(flat) + 1)


def pit_histogram(draws: torch.Tensor, target: torch.Tensor, bins: int = 10) -> torch.Tensor:
    r"""Compute the histogram of the probability integral transform, without random numbers.

    Each observation spreads its mass evenly between its :func:`pit_bounds`. Of a calibrated
    prediction every bin holds :math:`1 / \text{bins}` in expectation. A U says that the
    predictions are too narrow, a hump that they are too wide, a slope that they are biased.

    Args:
        draws: ``(S, B, ...)``.
        target: ``(B, ...)``; entries that are NaN are left out.
        bins: How many equal bins of [0, 1].

    Returns:
        The share of observations in each bin, ``(bins,)``, in float64; sums to 1.

    Raises:
        ValueError: For shapes that do not belong together.

    Example:
        >>> draws = torch.tensor([1.0, 2.0, 3.0]).unsqueeze(1).expand(3, 2)
        >>> pit_histogram(draws, torch.tensor([0.0, 1.5]), bins=4)
        tensor([0.5000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)

    Source: Czado, Gneiting and Held 2009, "Predictive model assessment for count data", section 2.
    """
    masses = pit_masses(draws, target, bins)
    return masses / masses.sum()


def pit_masses(draws: torch.Tensor, target: torch.Tensor, bins: int) -> torch.Tensor:
    """Add up in each bin the shares of the observations that lie there; the sum counts them."""
    lower, upper = pit_bounds(draws, target)
    bins = read_count(bins, "bins")
    edges = torch.arange(bins + 1, dtype=torch.float64, device=lower.device).unsqueeze(1) / bins
    below = ((edges - lower) / (upper - lower)).clamp(0, 1)  # (bins + 1, entries)
    return below.diff(dim=0).sum(1)


def distance_from_uniform(histogram: torch.Tensor) -> torch.Tensor:
    r"""Compute the share of observations that would have to change bins for equal shares.

    .. math:: \frac12 \sum_k |h_k - 1/K|

    the total variation distance of K shares from equal ones: 0 if calibrated, below 1. Its
    mean over samples of n observations of a calibrated prediction is about
    :math:`0.4 \sqrt{K / n}`.

    Example:
        >>> distance_from_uniform(torch.tensor([0.5, 0.5, 0.0, 0.0]))
        tensor(0.5000)
    """
    return (histogram - 1 / len(histogram)).abs().sum() / 2
