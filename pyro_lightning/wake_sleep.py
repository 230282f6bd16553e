"""Reweighted wake-sleep, with the weights of each row by themselves where rows are independent."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from pyro.infer import ReweightedWakeSleep

from pyro_lightning.particles import draw_particles, log_mean_exp


def wake_sleep_loss(
    elbo: ReweightedWakeSleep,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> torch.Tensor:
    r"""Estimate the log-evidence from K particles, negated, with the gradients of wake-sleep.

    With :math:`w_{ik} = p(x_i, z_{ik}) / q(z_{ik})` the value, in nats, is that of the wake phase
    of the model, the bound of importance-weighted autoencoders:

    .. math:: -\sum_i \log \frac{1}{K} \sum_{k=1}^K w_{ik}

    The sum runs over rows where every site stands in the data plate, as in
    :func:`pyro_lightning.renyi.renyi_loss`. Draws carry no gradient: the model follows the value's,
    and the guide that of

    .. math:: -\sum_i \Big[ a \sum_k \bar w_{ik} \log q(z_{ik} \mid x_i)
        + (1 - a) \operatorname{E}_{p(x, z)} \log q(z \mid x) \Big]

    with the weights of a row divided by their sum, and a the share ``insomnia``. A pure sleep phase
    of a model without parameters has the value of its own term.

    Args:
        elbo: The particles, and the share of the sleep phase. This one needs a guide that takes
            ``observations``, as in Pyro.
        model: The model, unscaled.
        guide: The guide, unscaled.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.

    Returns:
        A scalar tensor.

    Source: Bornschein and Bengio 2015, "Reweighted wake-sleep"; Le et al. 2019, "Revisiting
    reweighted wake-sleep for models with stochastic control flow".
    """
    if elbo.insomnia == 0 and not elbo.model_has_params:
        return _sleep(elbo, model, guide, args, kwargs)
    log_model, log_guide, _ = draw_particles(elbo, model, guide, args, kwargs, detached=True)
    log_weights = log_model - log_guide.detach()
    loss = -log_mean_exp(log_weights).sum()
    towards_guide = torch.zeros_like(loss)
    if elbo.insomnia > 0:
        shares = log_weights.detach().softmax(0)
        towards_guide = towards_guide - elbo.insomnia * (shares * log_guide).sum()
    if elbo.insomnia < 1:
        asleep = _sleep(elbo, model, guide, args, kwargs)
        towards_guide = towards_guide + (1 - elbo.insomnia) * asleep
    return loss + towards_guide - towards_guide.detach()


def _sleep(elbo: Any, model: Any, guide: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """Let Pyro compute the sleep phase, which is a sum over rows, alone."""
    asleep = copy(elbo)
    asleep.insomnia, asleep.model_has_params = 0.0, False
    # Pyro writes the observations of its own draws into the keyword arguments.
    return torch.as_tensor(asleep._loss(model, guide, args, dict(kwargs))[1])
