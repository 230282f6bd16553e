"""The loss: the negative ELBO of the whole training set, estimated from one batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_lightning.handlers import DataPlateMessenger


def negative_elbo(
    elbo: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    plates: Mapping[str, int],
    batch_size: int,
) -> torch.Tensor:
    r"""Estimate the negative ELBO of N observations from B of them, as a sum in nats.

    .. math:: -\Big[\log p(\theta) - \log q(\theta) + \frac{N}{B} \sum_{i=1}^{B}
        \log p(x_i, z_i \mid \theta) - \log q(z_i \mid \theta)\Big]

    Args:
        elbo: A Pyro ELBO with ``differentiable_loss``.
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plates: Size N of each data plate, by name; empty to scale nothing.
        batch_size: B.

    Raises:
        ValueError: When no observed site of the model stands in a data plate.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0., 1.), obs=x)
        >>> loss = negative_elbo(pyro.infer.Trace_ELBO(), model, lambda x: None,
        ...                      (torch.zeros(2),), {}, plates={"data": 10}, batch_size=2)
        >>> round(float(loss), 3)  # 10 * log(2 * pi) / 2
        9.189
    """
    handler = DataPlateMessenger(plates, batch_size)
    scaled_model, scaled_guide = handler(model), DataPlateMessenger(plates, batch_size)(guide)
    loss: torch.Tensor = elbo.differentiable_loss(scaled_model, scaled_guide, *args, **kwargs)
    if plates and not handler.scaled_observations:
        raise ValueError(
            f"no observed site of the model stands in a data plate ({', '.join(plates)}). Put the "
            "likelihood inside `with pyro.plate('data', len(x)):`, or name your plate."
        )
    return loss
