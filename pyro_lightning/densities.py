"""The log predictive density of observations, from draws of the posterior."""

import math

import torch

from pyro_lightning.arguments import read_tensor


def pointwise_density(log_likelihood: torch.Tensor) -> torch.Tensor:
    r"""Average the likelihood of each observation over draws, in logarithms.

    .. math:: \text{lpd}_i = \log \frac{1}{S} \sum_{s=1}^{S} p(y_i \mid \theta_s)

    Args:
        log_likelihood: In nats, ``(S, B)``: a row a draw, a column an observation.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: For another shape, or no draw.
        TypeError: For what is no tensor of real numbers.

    Example:
        >>> pointwise_density(torch.tensor([[0.25, 1.0], [0.75, 1.0]]).log()).exp()
        tensor([0.5000, 1.0000])
    """
    log_likelihood = read_tensor(log_likelihood, "log_likelihood")
    if log_likelihood.dim() != 2 or not len(log_likelihood):
        raise ValueError(
            "log_likelihood must be (S, B), at least one draw by observations, got "
            f"{tuple(log_likelihood.shape)}. Sum a log-density over the event of an observation."
        )
    return torch.logsumexp(log_likelihood, 0) - math.log(len(log_likelihood))


def density_sums(log_likelihood: torch.Tensor) -> torch.Tensor:
    """Add up what :func:`mean_with_error` needs: number, sum and sum of squares, in float64."""
    each = pointwise_density(log_likelihood).double()
    return torch.stack([torch.full_like(each.sum(), each.numel()), each.sum(), each.square().sum()])


def mean_with_error(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mean over N observations and its standard error.

    The error is sd / sqrt(N), of the sd with N - 1 in its denominator: NaN for a single one.

    Args:
        sums: Their number, their sum and the sum of their squares.

    Example:
        >>> mean_with_error(torch.tensor([4.0, 10.0, 30.0]))  # of 1, 2, 3, 4
        (tensor(2.5000), tensor(0.6455))
    """
    count, total, squares = sums
    mean = total / count
    variance = ((squares - count * mean.square()) / (count - 1)).clamp(min=0)
    return mean, (variance / count).sqrt()


def log_predictive_density(log_likelihood: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Estimate the expected log predictive density of an observation, with its standard error.

    .. math:: \text{elpd} = \frac{1}{B} \sum_{i=1}^{B} \log \frac{1}{S} \sum_{s=1}^{S}
        p(y_i \mid \theta_s), \qquad \text{se} = \text{sd}_i / \sqrt{B}

    A mean over the B observations in nats, not a sum: N times it is the elpd of the literature. Of
    held-out observations it needs no correction; of those that trained it is too high. The error
    is of the choice of observations. S draws make it too low by about
    :math:`\text{var}_s(p) / (2 S \bar p^2)`.

    Args:
        log_likelihood: In nats, ``(S, B)``: a row a draw, a column an observation.

    Returns:
        The mean and its standard error, in float64.

    Raises:
        ValueError: For another shape, or no draw.

    Example:
        >>> elpd, se = log_predictive_density(torch.tensor([[0.2, 0.4], [0.6, 0.4]]).log())
        >>> elpd.exp()
        tensor(0.4000, dtype=torch.float64)

    Source: Vehtari, Gelman and Gabry 2017, "Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC", sections 2 and 5.
    """
    return mean_with_error(density_sums(log_likelihood))
