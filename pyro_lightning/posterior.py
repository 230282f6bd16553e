"""Draws of the global latents from a guide."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable

from pyro_lightning.guides import parts_of
from pyro_lightning.handlers import is_subsample


def sample_globals(
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_samples: int,
    *,
    plates: Iterable[str],
    autoguide: Any = None,
) -> dict[str, torch.Tensor]:
    """Draw the latents outside the data plates, ``(num_samples, *shape of the site)`` each.

    An autoguide draws all samples at once, in an outer plate; another guide runs once a sample.

    Args:
        guide: The guide, under the handlers that it needs.
        args: Positional arguments of one batch.
        kwargs: Keyword arguments of one batch.
        num_samples: Number of draws.
        plates: Names of the data plates, whose latents are left out.
        autoguide: The autoguide that ``guide`` calls, where it can draw in an outer plate.

    Example:
        >>> def guide():
        ...     pyro.sample("w", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> sample_globals(guide, (), {}, 5, plates=["data"])["w"].shape
        torch.Size([5, 3])
    """
    if autoguide is None:
        draws = [_global_values(guide, args, kwargs, set(plates)) for _ in range(num_samples)]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    sites = dict(autoguide.prototype_trace.iter_stochastic_nodes())
    # The new plate must stand left of every plate of the guide.
    depth = max((-f.dim for s in sites.values() for f in s["cond_indep_stack"]), default=0)
    with pyro.plate("_num_samples", num_samples, dim=-1 - depth):
        values = _global_values(guide, args, kwargs, set(plates))
    shapes = {name: sites[name]["value"].shape for name in values}
    return {name: value.reshape(num_samples, *shapes[name]) for name, value in values.items()}


def draws_at_once(guide: Any) -> bool:
    """Whether a guide is an autoguide all of whose parts can draw in an outer plate."""
    parts = parts_of(guide)
    return (
        bool(parts)
        and parts[0] is guide
        and guide.prototype_trace is not None
        and not any(isinstance(part, AutoCallable) for part in parts)
    )


def _global_values(
    guide: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], plates: set[str]
) -> dict[str, torch.Tensor]:
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not is_subsample(site)
        and not site["infer"].get("is_auxiliary")
        and not any(frame.name in plates for frame in site["cond_indep_stack"])
    }
