"""Renyi's bound, of each row by itself where rows are independent."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import RenyiELBO

from pyro_lightning.particles import draw_particles, log_mean_exp


def renyi_loss(
    elbo: RenyiELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> torch.Tensor:
    r"""Estimate Renyi's bound of order :math:`\alpha` from K particles, negated, in nats.

    .. math:: -\sum_i \frac{1}{1 - \alpha} \log \frac{1}{K} \sum_{k=1}^K
        \left( \frac{p(x_i, z_{ik})}{q(z_{ik})} \right)^{1 - \alpha}

    The sum runs over rows where every site stands in the data plate: a batch then speaks for the
    data set by a factor N/B outside the logarithm, which the caller applies; N/B within it, as
    Pyro has it, gives another number. A latent outside the plate joins all rows under
    one logarithm, which no part of them estimates; then the sum has the one term of the whole
    data set.

    The gradient is that of the expectation of this K-particle bound: through the draws where
    they are reparametrised, else by the score function, each draw's against the bound of the
    other draws.

    Args:
        elbo: The order, and the particles.
        model: The model, unscaled.
        guide: The guide, unscaled.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.

    Returns:
        A scalar tensor.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0., 1.), obs=x)
        >>> round(float(renyi_loss(RenyiELBO(), model, lambda x: None, (torch.zeros(2),), {})), 3)
        1.838

    Source: Li and Turner 2016, "Renyi divergence variational inference", equation 6; the score
    function's control: Mnih and Rezende 2016, "Variational inference for Monte Carlo objectives".
    """
    particles = draw_particles(elbo, model, guide, args, kwargs)
    order = 1.0 - float(elbo.alpha)
    powers = order * (particles.log_model - particles.log_guide)
    bound = log_mean_exp(powers) / order
    if particles.score.requires_grad:
        credit = bound.detach() - _of_the_others(powers.detach()) / order
        surrogate = (particles.score * credit).sum(0)
        bound = bound + surrogate - surrogate.detach()
    return -bound.sum()


def _of_the_others(powers: torch.Tensor) -> torch.Tensor:
    """Leave each particle out in turn: a bound that its draw has no part in."""
    count = len(powers)
    if count == 1:
        return torch.zeros_like(powers)
    others = [torch.cat([powers[:k], powers[k + 1 :]]) for k in range(count)]
    return torch.stack([log_mean_exp(each) for each in others])
