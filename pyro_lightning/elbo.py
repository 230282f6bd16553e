"""The loss: the negative ELBO of the whole training set, estimated from one batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, EnergyDistance

from pyro_lightning.arguments import shortly
from pyro_lightning.baselines import DecayingBaselines
from pyro_lightning.diagnosis import explained, non_finite_report, not_finite, rows_at_fault
from pyro_lightning.handlers import DataPlateMessenger, observed
from pyro_lightning.layout import telling_contents
from pyro_lightning.losses import differentiable_loss, refuse_unserved
from pyro_lightning.structure import SEE_TABLE
from pyro_lightning.unscalable import refuse_unscalable, scale_of_whole


class Estimate(NamedTuple):
    """An estimate of the negative ELBO, and the sites that ran to make it."""

    loss: torch.Tensor
    model_sites: list[Any]
    guide_sites: list[Any]


def negative_elbo(
    elbo: ELBO | EnergyDistance,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    plates: Mapping[str, int],
    batch_size: int,
    scale_sites: Mapping[str, int] | None = None,
) -> torch.Tensor:
    r"""Estimate the negative ELBO of N observations from B of them, as a sum in nats.

    .. math:: -\Big[\log p(\theta) - \log q(\theta) + \frac{N}{B} \sum_{i=1}^{B}
        \log p(x_i, z_i \mid \theta) - \log q(z_i \mid \theta)\Big]

    Args:
        elbo: A Pyro ELBO, as :class:`PyroSVIModule` takes it.
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plates: Size N of each data plate, by name; with ``scale_sites`` empty too, nothing is
            scaled.
        batch_size: B.
        scale_sites: Size N of each site that is scaled though it stands in no data plate, by name.

    Returns:
        A scalar tensor; differentiable where gradients are enabled.

    Raises:
        TypeError: When an argument is of a kind that cannot serve.
        ValueError: When no observed site of the model stands in a data plate, when the loss is not
            finite, or when the ELBO cannot be scaled for this model.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0., 1.), obs=x)
        >>> loss = negative_elbo(pyro.infer.Trace_ELBO(), model, lambda x: None,
        ...                      (torch.zeros(2),), {}, plates={"data": 10}, batch_size=2)
        >>> round(float(loss), 3)  # 10 * log(2 * pi) / 2
        9.189

    Source: Hoffman et al. 2013, "Stochastic variational inference", section 2.
    """
    refuse_unserved(elbo)
    for name, fn in (("model", model), ("guide", guide)):
        if not callable(fn):
            raise TypeError(f"{name} must be a function of args and kwargs, got {shortly(fn)}")
    named = isinstance(kwargs, Mapping) and all(isinstance(key, str) for key in kwargs)
    if not isinstance(args, tuple | list) or not named:
        raise TypeError(
            "args must be a tuple or list, and kwargs a mapping by name, of what model and guide "
            f"take, got {shortly(args)} and {shortly(kwargs)}"
        )
    handler = partial(DataPlateMessenger, plates, batch_size, scale_sites)
    handler()  # reads its arguments
    with telling_contents([*args, *([kwargs] if kwargs else [])]):
        return estimate_elbo(elbo, model, guide, args, kwargs, handler).loss


def estimate_elbo(
    elbo: ELBO | EnergyDistance,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    handler: Callable[[], DataPlateMessenger],
    baselines: DecayingBaselines | None = None,
) -> Estimate:
    """Do what :func:`negative_elbo` does, and return the sites that ran as well.

    ``handler`` makes what scales model and guide. ``baselines`` holds the running averages of a
    ``TraceGraph_ELBO`` from step to step; without it they start anew, which leaves the gradient
    unbiased.
    """
    with explained((args, kwargs), handler, model, guide):
        loss, in_model, in_guide = run_elbo(elbo, model, guide, args, kwargs, handler, baselines)
    if loss.is_complex():
        raise ValueError(
            f"the loss is a number of {loss.dtype}: a site of the model has a complex "
            f"log-probability. {SEE_TABLE}"
        )
    if not torch.isfinite(loss):
        report = non_finite_report((args, kwargs), in_guide, in_model) or (
            "every site's log-probability is finite, so it is their scaled sum that overflows"
        )
        rows = rows_at_fault((args, kwargs), in_guide, in_model)
        raise not_finite(f"the loss is {loss.item()}: {report}", rows)
    if (in_model.plates or in_model.scale_sites) and not in_model.scaled_observations:
        _refuse_unscaled(in_model)
    return Estimate(loss, in_model.sites, in_guide.sites)


def run_elbo(
    elbo: ELBO | EnergyDistance,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    handler: Callable[[], DataPlateMessenger],
    baselines: DecayingBaselines | None = None,
) -> tuple[torch.Tensor, DataPlateMessenger, DataPlateMessenger]:
    """Compute the loss of :func:`estimate_elbo`, without a look at its value.

    Returns:
        The loss, and the handlers under which model and guide ran.
    """
    in_model, in_guide = handler(), handler()
    sizes = [*in_model.plates.values(), *in_model.scale_sites.values()]
    scale = scale_of_whole(elbo, sizes, in_model.batch_size)
    loss = differentiable_loss(
        elbo, in_model(model), in_guide(guide), args, kwargs, scale=scale, baselines=baselines
    )
    refuse_unscalable(elbo, in_model.sites, in_guide.sites, in_model.plates, scale)
    return loss, in_model, in_guide


def _refuse_unscaled(handler: DataPlateMessenger) -> None:
    plates, scale_sites = handler.plates, handler.scale_sites
    names = sorted({site["name"] for site in observed(handler.sites)})
    met = sorted({f.name for site in handler.sites for f in site["cond_indep_stack"]})
    sought = f"data plate ({', '.join(map(repr, plates))})" if plates else "scale_sites"
    if scale_sites:
        sought += f" or is one of {', '.join(map(repr, scale_sites))}"
    raise ValueError(
        f"no observed site of the model stands in the {sought}, so nothing would be scaled by N/B "
        f"and the prior would count N/B times too much. Observed sites: {names or 'none'}; plates "
        f"met: {met or 'none'}. Put the likelihood inside `with pyro.plate('data', len(x)):`, name "
        "your plate by data_plate=..., name the sites by scale_sites=(...), or say data_plate=None "
        f"if the model scales itself or has local latents only. {SEE_TABLE}"
    )
