"""The continuous ranked probability score of observations, from draws that predict them."""

import torch

from pyro_lightning.draws import paired


def pointwise_crps(draws: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""Compute the score of each observation.

    .. math:: \frac{1}{S} \sum_s |x_s - y| - \frac{1}{2 S^2} \sum_{s,t} |x_s - x_t|

    The sum over pairs is :math:`2 \sum_s (2 s - S - 1) x_{(s)}` of the ordered draws: of S log S
    operations, where all pairs are S^2.

    Args:
        draws: ``(S, B, ...)``.
        target: ``(B, ...)``; entries that are NaN are left out.

    Returns:
        ``(entries,)``.

    Raises:
        ValueError: For shapes that do not belong together.

    Example:
        >>> pointwise_crps(torch.tensor([[1.0], [3.0]]), torch.tensor([2.0]))
        tensor([0.5000])
    """
    flat, observed = paired(draws, target)
    # From the observation, lest rounding grow with a mean that is far from 0.
    ordered = (flat - observed).sort(0).values
    count = len(ordered)
    numbers = torch.arange(count, dtype=ordered.dtype, device=ordered.device)
    weights = ((2 * numbers + 1 - count) / count**2).unsqueeze(1)
    return ordered.abs().mean(0) - (weights * ordered).sum(0)


def crps(draws: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""Compute the mean continuous ranked probability score, in the units of the observations.

    .. math:: \frac{1}{n} \sum_{i=1}^{n} \int (F_i(x) - 1[x \ge y_i])^2 dx

    of the empirical distribution :math:`F_i` of S draws, the mean over the n entries of the target
    that are not NaN. Lower is better; of a single draw it is the absolute error. It is
    ``torchmetrics.functional.regression.continuous_ranked_probability_score(draws.T, target)``.

    Args:
        draws: ``(S, B, ...)``.
        target: ``(B, ...)``.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: For shapes that do not belong together.

    Example:
        >>> crps(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([2.0, 0.0]))
        tensor(0.2500)

    Source: Gneiting and Raftery 2007, "Strictly proper scoring rules, prediction, and estimation",
    section 4.2.
    """
    return pointwise_crps(draws, target).mean()
