"""Which masks of latents the guide must follow: those of entries that nothing depends on."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
)

from pyro_lightning.guides import parts_of
from pyro_lightning.masks import mask_of
from pyro_lightning.reruns import Handled, run_again
from pyro_lightning.shapes import ShortenedValues
from pyro_lightning.structure import SEE_TABLE, described

CARRIED, KEPT, OPEN = "carried", "kept", "open"
_BY_SITE = (AutoNormal, AutoDiscreteParallel)
_LISTS = (AutoCallable, AutoGuideList)
_DRAWS = 8

_REMEDY = (
    "Keep its prior in all entries and mask the likelihood alone: what is not observed then has "
    "its prior for a posterior"
)


def masked_latents(
    model_sites: Iterable[Any],
    guide_sites: Iterable[Any],
    guide: Any,
    elbo: Any,
    run: Callable[[dict[str, Any]], list[Any]],
    refuse: bool = True,
) -> dict[str, str]:
    r"""Tell for each latent with a mask whether the guide's terms must be masked as well.

    Where the model's term is masked and nothing else depends on an entry, the ELBO would keep

    .. math:: -\log q(z_i)

    alone of it, and grow without bound as the guide widens. Where the rest of the model depends on
    a latent that is masked whole, its mask is a flat prior, and the guide's term belongs there.

    Args:
        model_sites: Messages of the sites of one run of the model.
        guide_sites: Messages of the sites of one run of the guide.
        guide: The guide.
        elbo: The ELBO.
        run: Runs the model with latents of given values, always with the same random numbers;
            returns the messages of its sites.
        refuse: Whether what cannot be made right is an error.

    Returns:
        By latent ``"carried"`` (masked in the guide, too), ``"kept"`` (the guide stays as it is) or
        ``"open"`` (carried, and every entry is there in this batch, so that the next one decides).

    Raises:
        ValueError: Naming the site, where no mask of the guide makes the ELBO right.
    """
    model_sites, guided = list(model_sites), {site["name"] for site in guide_sites}
    found: dict[str, str] = {}
    for site in model_sites:
        name = site["name"]
        if site["is_observed"] or name not in guided:
            continue
        part = _part_of(name, guide)
        if isinstance(part, AutoDelta):  # a point has no density that could grow
            found[name] = KEPT
            continue
        try:
            mask = mask_of(site)
        except ValueError:
            if refuse:
                raise
            mask, found[name] = True, KEPT
        if mask is True:
            continue
        by_site = part is None or isinstance(part, _BY_SITE)
        whole = isinstance(mask, bool) or mask.numel() == 1
        if bool(torch.as_tensor(mask).all()):
            found[name] = OPEN if by_site else KEPT
        elif not _in_use(site, torch.as_tensor(mask), model_sites, run):
            found[name] = CARRIED if by_site else KEPT
        else:
            found[name] = KEPT
            if refuse and not whole:
                raise ValueError(
                    f"{described(site)} has no prior where its mask is False, but other sites "
                    f"depend on it there: the ELBO would hold it to no prior. {_REMEDY}. "
                    f"{SEE_TABLE}"
                )
            if refuse and isinstance(elbo, TraceMeanField_ELBO) and site["mask"] is not None:
                raise ValueError(
                    f"{described(site)} is masked by poutine.mask, which TraceMeanField_ELBO "
                    "passes over: it takes the KL from the prior that is masked. Use Trace_ELBO, "
                    f"or mask the distribution: dist.Normal(0., 1.).mask(False). {SEE_TABLE}"
                )
            continue
        if refuse and not by_site:
            raise ValueError(
                f"{described(site)} has a mask, and {type(part).__name__} has one density for all "
                f"entries of its latents, the ones that are masked among them. {_REMEDY}; or give "
                "the site to AutoNormal (AutoGuideList joins it to another guide), whose entries "
                f"are masked one by one. {SEE_TABLE}"
            )
    return found


def _part_of(name: str, guide: Any) -> Any:
    """Return the autoguide that holds a site's density; None for what is written by hand."""
    for part in parts_of(guide):
        if isinstance(part, _LISTS) or part.prototype_trace is None:
            continue
        # The names alone: some autoguides empty the nodes of their prototype.
        if name in part.prototype_trace.nodes:
            return part
    return None


def _in_use(
    site: Any,
    mask: torch.Tensor,
    model_sites: list[Any],
    run: Callable[[dict[str, Any]], list[Any]],
) -> bool:
    """Whether another value of a latent's masked entries changes the density of any site."""
    fn, value = site["fn"], site["value"]
    shown = mask.reshape(mask.shape + (1,) * fn.event_dim)
    values = {s["name"]: s["value"] for s in model_sites if not s["is_observed"]}
    before = run(values)
    # A discrete value may well be drawn again.
    for _ in range(_DRAWS if getattr(fn, "has_enumerate_support", False) else 1):
        with torch.no_grad():
            drawn = torch.where(shown, value, fn().expand(value.shape))
        if _differ(before, run({**values, site["name"]: drawn})):
            return True
    return False


def _differ(before: list[Any], after: list[Any]) -> bool:
    ours, theirs = ({s["name"]: s for s in sites} for sites in (before, after))
    if ours.keys() != theirs.keys():
        return True
    return any(
        one.shape != other.shape or not torch.allclose(one, other, equal_nan=True)
        for one, other in ((_log_prob(ours[name]), _log_prob(theirs[name])) for name in ours)
    )


def _log_prob(site: Any) -> torch.Tensor:
    if site["infer"].get("_deterministic") or not hasattr(site["fn"], "log_prob"):
        return torch.zeros(())
    with torch.no_grad():
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return torch.as_tensor(scale_and_mask(log_prob, 1.0, site["mask"]))


def run_model_with(module: Any, batch: Any, handled: Handled, values: dict[str, Any]) -> list[Any]:
    """Run a module's model on a batch with latents of given values, on one random state."""
    return run_again(module, module.model, batch, handled, ShortenedValues(values), seed=0).sites


def find_masked(
    module: Any,
    batch: Any,
    handled: Handled,
    model_sites: list[Any],
    guide_sites: list[Any],
    refuse: bool,
) -> dict[str, str]:
    """Do what :func:`masked_latents` does, for a batch of a module."""
    run = partial(run_model_with, module, batch, handled)
    return masked_latents(model_sites, guide_sites, module.guide, module.elbo, run, refuse)


def open_masks(known: Mapping[str, str], model_sites: list[Any], guide_sites: list[Any]) -> bool:
    """Whether a batch is the first to leave out entries of a latent whose mask is open.

    Raises:
        ValueError: Naming a latent with a mask that it did not have in the first batch.
    """
    decide = False
    for site in model_sites:
        if site["is_observed"] or known.get(site["name"]) in (CARRIED, KEPT):
            continue
        mask = mask_of(site)
        if mask is True:
            continue
        if site["name"] in known:
            decide = decide or not bool(torch.as_tensor(mask).all())
        elif any(each["name"] == site["name"] for each in guide_sites):
            raise ValueError(
                f"{described(site)} has a mask in this batch and had none in the first, so that "
                "the guide's terms are not masked. Give it a mask in every batch, of all True "
                f"where nothing is left out. {SEE_TABLE}"
            )
    return decide
