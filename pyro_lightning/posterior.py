"""Draws of latents from a guide."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable

from pyro_lightning.guides import parts_of
from pyro_lightning.handlers import is_subsample


def sample_latents(
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    num_samples: int,
    *,
    plates: Iterable[str],
    local: Collection[str] = (),
    at_once: bool = False,
) -> dict[str, torch.Tensor]:
    """Draw the latents outside the data plates, and those within that are named.

    Each is ``(num_samples, *shape of the site)``, all of one draw belong together.

    The guide runs once a sample, or once for all in an outer plate where it allows that.

    Args:
        guide: The guide, under the handlers that it needs.
        args: Positional arguments of one batch.
        kwargs: Keyword arguments of one batch.
        num_samples: Number of draws.
        plates: Names of the data plates, whose latents are left out.
        local: Names of latents in the data plates that are drawn as well.
        at_once: Whether the guide can draw in an outer plate.

    Example:
        >>> def guide():
        ...     pyro.sample("w", pyro.distributions.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> sample_latents(guide, (), {}, 5, plates=["data"])["w"].shape
        torch.Size([5, 3])
    """
    draw = partial(_latents, guide, args, kwargs, set(plates), set(local))
    if not at_once:
        draws = [draw()[0] for _ in range(num_samples)]
        return {
            name: torch.stack([sites[name]["value"].detach() for sites in draws])
            for name in draws[0]
        }
    single, depth = draw()
    # The new plate must stand left of every plate of the guide.
    with pyro.plate("_num_samples", num_samples, dim=-1 - depth):
        sites, _ = draw()
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


def sites_of_data(
    guide_sites: Iterable[Any], plates: Collection[str], served: Collection[str]
) -> tuple[str, ...]:
    """Name the latents in the data plates that a guide computes from its batch.

    Args:
        guide_sites: Messages of the sites of one run of the guide.
        plates: Names of the data plates.
        served: Sites of which the guide keeps parameters for every row.
    """
    return tuple(
        site["name"]
        for site in guide_sites
        if is_latent(site) and stands_in(site, plates) and site["name"] not in served
    )


def _latents(
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    plates: set[str],
    local: set[str],
) -> tuple[dict[str, Any], int]:
    """Run the guide; returns the sites that are asked for, and the depth of all its plates."""
    nodes = poutine.trace(guide).get_trace(*args, **kwargs).nodes
    sites = {n: s for n, s in nodes.items() if s["type"] == "sample" and not is_subsample(s)}
    frames = (frame for site in sites.values() for frame in site["cond_indep_stack"])
    depth = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
    wanted = {
        name: site
        for name, site in sites.items()
        if is_latent(site) and (name in local or not stands_in(site, plates))
    }
    return wanted, depth


def is_latent(site: Any) -> bool:
    """Whether a site of a guide is a latent of the model."""
    return not site["is_observed"] and not site["infer"].get("is_auxiliary")


def stands_in(site: Any, plates: Collection[str]) -> bool:
    """Whether a site stands in one of the plates."""
    return any(frame.name in plates for frame in site["cond_indep_stack"])
