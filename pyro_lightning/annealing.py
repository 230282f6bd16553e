"""The weight of the KL in a loss: which terms it multiplies, and how it rises to 1."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import (
    ELBO,
    EnergyDistance,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine.messenger import Messenger

from pyro_lightning.handlers import is_subsample
from pyro_lightning.structure import SCALES_DIFFER

# Sums in which the KL is a term of its own.
_SERVED = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO)


class KLWeightMessenger(Messenger):
    r"""Multiplies the terms of latents by a weight, as ``poutine.scale`` around them would.

    .. math:: \text{scale} \leftarrow \beta \cdot \text{scale}

    for every site of a guide, whose sum is log q, and for those sites of a model that are latents
    of the guide, whose sum is the log p of the KL. What is observed, ``pyro.factor`` of a model
    among it, and a latent that the model sums out by enumeration belong to the likelihood. A scale
    N/B is kept.

    Args:
        weight: :math:`\beta`, a number or a scalar tensor.
        guided: Names of the guide's sites: those that a handler around the guide has met, and
            those that one around the model weighs. See :func:`weigh_kl`.
        in_guide: Whether this one stands around the guide.

    Source: Bowman et al. 2016, "Generating sentences from a continuous space"; Higgins et al. 2017,
    "beta-VAE"; ``pyro.poutine.scale``.
    """

    def __init__(self, weight: float | torch.Tensor, guided: set[str], in_guide: bool) -> None:
        super().__init__()
        self.weight, self.guided, self.in_guide = weight, guided, in_guide

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            return
        if self.in_guide:
            self.guided.add(msg["name"])
        elif msg["is_observed"] or msg["name"] not in self.guided:
            return
        msg["scale"] = msg["scale"] * self.weight


def weigh_kl(
    model: Callable[..., Any], guide: Callable[..., Any], weight: float | torch.Tensor
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    r"""Put model and guide under handlers that multiply the KL of their latents by a weight.

    .. math:: -\operatorname{E}_q \log p(x \mid \theta, z)
        + \beta \operatorname{E}_q [\log q(\theta, z) - \log p(\theta, z)]

    is then what an ELBO's loss estimates, with N/B where it was. The guide has to run first, as it
    does in the ELBOs of :func:`check_weighed`.

    Args:
        model: The model.
        guide: The guide.
        weight: :math:`\beta`, a number or a scalar tensor.

    Returns:
        Both, as they are called in an ELBO.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0., 1.))
        ...     pyro.sample("x", dist.Normal(z, 1.), obs=torch.tensor(0.))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0., 1.))
        >>> model, guide = weigh_kl(model, guide, 0.5)
        >>> in_guide = pyro.poutine.trace(guide).get_trace()
        >>> in_model = pyro.poutine.trace(model).get_trace()
        >>> in_guide.nodes["z"]["scale"], in_model.nodes["z"]["scale"], in_model.nodes["x"]["scale"]
        (0.5, 0.5, 1.0)
    """
    guided: set[str] = set()
    return (
        KLWeightMessenger(weight, guided, in_guide=False)(model),
        KLWeightMessenger(weight, guided, in_guide=True)(guide),
    )


def check_weighed(elbo: ELBO | EnergyDistance) -> None:
    """Check that the KL of the latents is a term of an ELBO.

    Raises:
        ValueError: Naming the ELBO, and those that serve.
    """
    if not isinstance(elbo, _SERVED):
        names = ", ".join(each.__name__ for each in _SERVED)
        raise ValueError(
            f"the loss of {type(elbo).__name__} is no sum of a likelihood and the KL of the "
            f"latents, so that there is none to anneal. Use one of {names}, or leave KLAnnealing "
            "out."
        )


@contextmanager
def telling_of_enumeration() -> Iterator[None]:
    """Say what is wrong where a latent with a weight depends on one that is summed out.

    Raises:
        ValueError: In place of Pyro's, which names scales alone.
    """
    try:
        yield
    except ValueError as error:
        if SCALES_DIFFER not in str(error):
            raise
        raise ValueError(
            "a latent of the guide depends on one that TraceEnum_ELBO sums out in the model. Its "
            "prior stands inside the logarithm of that sum with the likelihood, so that the KL is "
            "no term of its own, and has no weight. Sample the enumerated latent in the guide, "
            "with infer={'enumerate': 'parallel'} there, or leave KLAnnealing out."
        ) from error


def rising_weight(done: int, length: int, start: float, cycles: int, ramp: float) -> float:
    r"""Weight of the KL after some steps, or epochs, of an annealing.

    .. math:: \beta_t = \beta_0 + (1 - \beta_0) \min(1, \tau_t / R), \qquad
        \tau_t = (t M \bmod T) / T

    and 1 from T on. With one cycle (M = 1) and R = 1 it is linear.

    Args:
        done: t, how many are done; the first has 0.
        length: T, how many the annealing takes.
        start: :math:`\beta_0`.
        cycles: M, how many times it rises.
        ramp: R, the share of a cycle in which it rises.

    Example:
        >>> [rising_weight(t, 4, 0.0, 1, 1.0) for t in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
        >>> [rising_weight(t, 8, 0.0, 2, 0.5) for t in range(9)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0]

    Source: Fu et al. 2019, "Cyclical annealing schedule".
    """
    if done >= length:
        return 1.0
    place = (done * cycles % length) / length
    return start + (1.0 - start) * min(1.0, place / ramp)
