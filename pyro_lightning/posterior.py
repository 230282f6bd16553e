"""Draws of the global latents from a guide."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
    at_once: bool = False,
) -> dict[str, torch.Tensor]:
    """Draw the latents outside the data plates, ``(num_samples, *shape of the site)`` each.

    The guide runs once a sample, or once for all in an outer plate where it allows that.

    Args:
        guide: The guide, under the handlers that it needs.
        args: Positional arguments of one batch.
        kwargs: Keyword arguments of one batch.
        num_samples: Number of draws.
        plates: Names of the data plates, whose latents are left out.
        at_once: Whether the guide can draw in an outer plate.

    Example:
        >>> def guide():
        ...     pyro.sample("w", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> sample_globals(guide, (), {}, 5, plates=["data"])["w"].shape
        torch.Size([5, 3])
    """
    draw = partial(_globals, guide, args, kwargs, set(plates))
    if not at_once:
        draws = [draw() for _ in range(num_samples)]
        return {
            name: torch.stack([sites[name]["value"].detach() for sites in draws])
            for name in draws[0]
        }
    single = draw()
    # The new plate must stand left of every plate of the guide.
    depth = max((-f.dim for s in single.values() for f in s["cond_indep_stack"]), default=0)
    with pyro.plate("_num_samples", num_samples, dim=-1 - depth):
        sites = draw()
    # Cloned, since what a point estimate draws is its parameter itself.
    return {
        name: site["value"].detach().reshape(num_samples, *single[name]["value"].shape).clone()
        for name, site in sites.items()
    }


def draws_at_once(guide: Any) -> bool:
    """Whether a guide is an autoguide all of whose parts can draw in an outer plate."""
    parts = parts_of(guide)
    return (
        bool(parts)
        and parts[0] is guide
        and guide.prototype_trace is not None
        and not any(isinstance(part, AutoCallable) for part in parts)
    )


def _globals(
    guide: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], plates: set[str]
) -> dict[str, Any]:
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not is_subsample(site)
        and not site["infer"].get("is_auxiliary")
        and not any(frame.name in plates for frame in site["cond_indep_stack"])
    }
