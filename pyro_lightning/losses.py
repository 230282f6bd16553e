"""How each ELBO of Pyro gives a scalar that can be differentiated, scaled where it belongs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)

from pyro_lightning.analytic_kl import AnalyticKLMessenger
from pyro_lightning.baselines import DecayingBaselines
from pyro_lightning.renyi import renyi_loss
from pyro_lightning.wake_sleep import wake_sleep_loss

# Sums over rows: a site's scale is a factor of its term.
_SUMS = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, Trace_MMD)
# Logarithms of a mean over particles: a site's scale would be an exponent of its term.
_LOG_MEANS = (RenyiELBO, ReweightedWakeSleep, TraceTMC_ELBO)
# Pyro's own code of these sums rows under one logarithm, or gives no scalar.
REPLACED = (RenyiELBO, ReweightedWakeSleep)
SERVED = (*_SUMS, *_LOG_MEANS, EnergyDistance)
SERVED_NAMES = ", ".join(each.__name__ for each in SERVED)


def refuse_unserved(elbo: Any) -> None:
    """Refuse what is no ELBO that is served.

    Raises:
        TypeError: Naming those that are.
    """
    if isinstance(elbo, type) and issubclass(elbo, ELBO | EnergyDistance):
        raise TypeError(f"elbo must be an instance: write elbo={elbo.__name__}()")
    if not isinstance(elbo, SERVED):
        got = type(elbo).__name__
        raise TypeError(f"elbo must be an instance of one of {SERVED_NAMES}; got {got}")


def differentiable_loss(
    elbo: ELBO | EnergyDistance,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    scale: float,
    baselines: DecayingBaselines | None = None,
) -> torch.Tensor:
    r"""Compute an ELBO's loss, with the gradient that the ELBO defines for it.

    Most ELBOs are a sum over rows, and right once each site is scaled. Those that take the
    logarithm of a mean over particles, of each row, need N/B outside of it:

    .. math:: \frac{N}{B} \sum_{i=1}^B \log \frac{1}{K} \sum_{k=1}^K w_{ik}

    A term outside the data plate, of which a particle has one, is divided by N/B within, so that
    it counts once.

    Args:
        elbo: One of those that are served.
        model: The model, its sites scaled by N/B where they belong.
        guide: The guide, likewise.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        scale: N/B, of :func:`pyro_lightning.unscalable.scale_of_whole`.
        baselines: Where running averages of ``TraceGraph_ELBO`` live; nowhere by default, and each
            call has averages of 0.

    Returns:
        A scalar tensor, for :func:`pyro_lightning.unscalable.refuse_unscalable` to judge.
    """
    if isinstance(elbo, _LOG_MEANS):
        if scale != 1:
            model, guide = (poutine.scale(fn, scale=1 / scale) for fn in (model, guide))
        if isinstance(elbo, RenyiELBO):
            return scale * renyi_loss(elbo, model, guide, args, kwargs)
        if isinstance(elbo, ReweightedWakeSleep):
            return scale * wake_sleep_loss(elbo, model, guide, args, kwargs)
        return scale * torch.as_tensor(elbo.differentiable_loss(model, guide, *args, **kwargs))
    if isinstance(elbo, EnergyDistance):
        return torch.as_tensor(elbo(model, guide, *args, **kwargs))
    if isinstance(elbo, TraceMeanField_ELBO):
        guide = AnalyticKLMessenger()(guide)
    if not torch.is_grad_enabled():
        # The same number; TraceEnum_ELBO.differentiable_loss refuses to run without gradients.
        return torch.as_tensor(elbo.loss(model, guide, *args, **kwargs))
    if isinstance(elbo, TraceGraph_ELBO):
        return _graph_loss(elbo, model, guide, args, kwargs, baselines or DecayingBaselines())
    return torch.as_tensor(elbo.differentiable_loss(model, guide, *args, **kwargs))


def _graph_loss(
    elbo: TraceGraph_ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    baselines: DecayingBaselines,
) -> torch.Tensor:
    """Join the value of the ELBO and the gradient of Pyro's surrogate, baselines' loss included."""
    losses = []
    for model_trace, guide_trace in elbo._get_traces(model, guide, args, kwargs):
        with baselines.in_place_of_store():
            value, surrogate = elbo._loss_and_surrogate_loss_particle(model_trace, guide_trace)
        value, surrogate = torch.as_tensor(value), torch.as_tensor(surrogate)
        losses.append(surrogate - surrogate.detach() - value.detach())
    return torch.stack(losses).sum() / float(elbo.num_particles)
