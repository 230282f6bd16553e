"""Central intervals of predictive draws: the observations that they cover, and their width."""

import math
from collections.abc import Sequence

import torch

from pyro_lightning.arguments import read_fraction, shortly
from pyro_lightning.draws import paired


def read_levels(levels: float | Sequence[float]) -> tuple[float, ...]:
    """Read one level of an interval or several.

    Raises:
        TypeError: For what are no numbers.
        ValueError: For a level outside (0, 1), one that is there twice, or none.
    """
    several = levels if isinstance(levels, Sequence) and not isinstance(levels, str) else [levels]
    read = tuple(read_fraction(level, "a level of an interval") for level in several)
    if not read or 0.0 in read or len(set(read)) < len(read):
        raise ValueError(
            f"levels must be one or more different numbers in (0, 1), got {shortly(levels)}"
        )
    return read


def central_intervals(
    draws: torch.Tensor, levels: float | Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Compute the ends of central intervals of draws.

    The quantile :math:`p` of S draws is their order statistic of number :math:`p (S + 1)`,
    between two of them interpolated linearly. A further draw then falls into the interval of a
    level with the probability of that level, whatever S is. ``torch.quantile`` counts
    :math:`p (S - 1) + 1`, whose 90% interval of 100 draws covers 88%.

    Args:
        draws: ``(S, ...)``.
        levels: Probabilities of the intervals, L of them.

    Returns:
        Lower and upper ends, ``(L, ...)``.

    Raises:
        ValueError: For a level that S draws cannot show: it takes S >= 2 / (1 - level) - 1 of them,
            39 for 95%.

    Example:
        >>> lower, upper = central_intervals(torch.arange(1.0, 20.0), 0.9)
        >>> lower, upper
        (tensor([1.]), tensor([19.]))

    Source: Hyndman and Fan 1996, "Sample quantiles in statistical packages", definition 6.
    """
    read, count = read_levels(levels), len(draws)
    ordered = draws.sort(0).values
    lower, upper = [], []
    for level in read:
        tail = (1 - level) / 2
        number = tail * (count + 1) - 1  # counted from 0
        if number < -1e-9:
            needed = math.ceil(1 / tail - 1 - 1e-9)
            raise ValueError(
                f"an interval of level {level:g} needs at least {needed} draws, got {count}"
            )
        first = max(math.floor(number + 1e-9), 0)
        part = max(number - first, 0.0)
        lower.append(torch.lerp(ordered[first], ordered[first + 1], part))
        upper.append(torch.lerp(ordered[-1 - first], ordered[-2 - first], part))
    return torch.stack(lower), torch.stack(upper)


def interval_coverage(
    draws: torch.Tensor, target: torch.Tensor, levels: float | Sequence[float] = (0.5, 0.9)
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Compute the share of observations in central intervals of their draws, and the mean width.

    .. math:: \frac{1}{n} \sum_{i=1}^{n} 1[l_i \le y_i \le u_i], \qquad
        \frac{1}{n} \sum_{i=1}^{n} u_i - l_i

    Means over the n entries of the target that are not NaN. The coverage of a calibrated prediction
    is the level, or more where draws can be equal, as those of counts; of two that are, the one
    with the smaller width says more.

    Args:
        draws: ``(S, B, ...)``.
        target: ``(B, ...)``.
        levels: Probabilities of the intervals, L of them.

    Returns:
        Coverage and width, ``(L,)`` each, in float64; the width in the units of the target.

    Raises:
        ValueError: For shapes that do not belong together, or a level that S draws cannot show.

    Example:
        >>> draws = torch.arange(1.0, 20.0).unsqueeze(1).expand(19, 4)
        >>> coverage, width = interval_coverage(draws, torch.tensor([0.0, 1.0, 10.0, 19.0]), 0.9)
        >>> coverage.item(), width.item()
        (0.75, 18.0)

    Source: Gneiting, Balabdaoui and Raftery 2007, "Probabilistic forecasts, calibration and
    sharpness".
    """
    count, covered, width = interval_sums(draws, target, levels)
    return covered / count, width / count


def interval_sums(
    draws: torch.Tensor, target: torch.Tensor, levels: float | Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add up over observed entries: their number, and by level how many are covered and widths."""
    flat, observed = paired(draws, target)
    lower, upper = central_intervals(flat, levels)
    covered = ((lower <= observed) & (observed <= upper)).double().sum(1)
    count = torch.tensor(float(observed.numel()), dtype=torch.float64, device=observed.device)
    return count, covered, (upper - lower).double().sum(1)
