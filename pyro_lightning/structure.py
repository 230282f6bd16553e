"""Refusals that need the sites of model and guide, as they ran once on the first batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO, TraceTMC_ELBO

SEE_TABLE = "svi.site_table(batch) lists every site."

# What TraceEnum_ELBO says where the sites that it sums over do not share one scale.
SCALES_DIFFER = "share a common poutine.scale"


def check_guide_sites(model_sites: Iterable[Any], guide_sites: Iterable[Any], elbo: Any) -> None:
    """Check that each latent of the model has its site in the guide, and each guide site a latent.

    Latents that an ELBO sums out (``infer={"enumerate": "parallel"}``) need none; nor does a site
    under ``poutine.mask(mask=False)``, which has no term.

    Args:
        model_sites: Messages of the sites of one run of the model.
        guide_sites: Messages of the sites of one run of the guide.
        elbo: The ELBO, which knows enumeration or not.

    Raises:
        ValueError: Naming the site. Pyro only warns, and only with its validation on.
    """
    model_sites, guide_sites = list(model_sites), list(guide_sites)
    latents = {s["name"]: s for s in model_sites if not s["is_observed"]}
    guided = {s["name"] for s in guide_sites}
    for name, site in latents.items():
        if name in guided or site["mask"] is False or site["infer"].get("is_auxiliary"):
            continue
        if is_enumerated(site, elbo):
            continue
        raise ValueError(
            f"{described(site)} of the model has no site in the guide. Pyro would draw it from its "
            f"prior at each step and keep log p({name}) in the loss without log q({name}), with no "
            f"more than a warning. {_uncovered_remedy(site)} {SEE_TABLE}"
        )
    for site in guide_sites:
        infer = site["infer"]
        if site["name"] in latents or infer.get("is_auxiliary") or infer.get("_deterministic"):
            continue
        name = site["name"]
        observed = any(s["name"] == name for s in model_sites)
        raise ValueError(
            f"{described(site)} of the guide is {'observed in' if observed else 'no site of'} the "
            f"model. Pyro would keep log q({name}) in the loss without log p({name}), with no more "
            "than a warning. Take it out of the guide, give it the name of one of the model's "
            f"latents ({', '.join(map(repr, latents)) or 'none'}), or mark it by "
            "infer={'is_auxiliary': True} if it only helps to draw other sites of the guide. "
            f"{SEE_TABLE}"
        )


def is_enumerated(site: Any, elbo: Any) -> bool:
    """Whether the ELBO sums a latent of the model out."""
    sums = isinstance(elbo, TraceEnum_ELBO | TraceTMC_ELBO)
    return sums and site["infer"].get("enumerate") == "parallel"


def _uncovered_remedy(site: Any) -> str:
    name, marked = site["name"], site["infer"].get("enumerate")
    add = f"Add pyro.sample('{name}', ...) to the guide, or give the model's obs=... if it is data"
    if marked == "parallel":
        return f"It is marked for enumeration: use elbo=TraceEnum_ELBO(). {add}."
    if marked or getattr(site["fn"], "has_enumerate_support", False):
        return f"{add}; or sum it out by infer={{'enumerate': 'parallel'}} and TraceEnum_ELBO."
    return f"{add}."


def check_enumeration(
    model_sites: Iterable[Any],
    guide_sites: Iterable[Any],
    elbo: Any,
    plates: Iterable[str],
    factors: Iterable[float],
) -> None:
    r"""Refuse a global latent that is summed out with the batch's scale outside its logarithm.

    .. math:: \log \sum_k p(k) \Big[\prod_{i=1}^{B} p(x_i \mid k)\Big]^{N/B}
        \neq \frac{N}{B} \log \sum_k p(k) \prod_{i=1}^{B} p(x_i \mid k)

    TraceEnum_ELBO can only do the right-hand side. It refuses where the scales of the sites differ
    (:func:`explained_scales`), but not where the latent was given the scale as well.

    Args:
        model_sites: Messages of the sites of one run of the model.
        guide_sites: Messages of the sites of one run of the guide.
        elbo: The ELBO.
        plates: Names of the data plates.
        factors: N/B of each data plate.

    Raises:
        ValueError: Naming the site.
    """
    for site in global_enumerated(model_sites, guide_sites, elbo, plates):
        scale = float(torch.as_tensor(site["scale"]).max())
        if scale != 1 and scale in factors:
            raise ValueError(
                f"{described(site)} is summed out, and scaled by N/B = {scale:g} though it stands "
                f"outside the data plate. {_GLOBAL_ENUMERATION} {SEE_TABLE}"
            )


_GLOBAL_ENUMERATION = (
    "Pyro puts the scale outside the logarithm of the sum over a latent that the model enumerates, "
    "which is right for a latent of each row only. Sample it in the guide, with "
    "infer={'enumerate': 'parallel'} there, so that TraceEnum_ELBO takes the exact mean over it; "
    "or enumerate only latents inside the data plate; or use the whole data set as one batch."
)


@contextmanager
def explained_scales(
    model_sites: Iterable[Any], guide_sites: Iterable[Any], elbo: Any, plates: Iterable[str]
) -> Iterator[None]:
    """Add to TraceEnum_ELBO's error of scales that differ which sites have them, and what to do.

    Only the run of the ELBO tells which sites depend on an enumerated one.
    """
    try:
        yield
    except ValueError as error:
        culprits = global_enumerated(model_sites, guide_sites, elbo, plates)
        if SCALES_DIFFER not in str(error) or not culprits:
            raise
        outside = " and ".join(map(described, culprits))
        scaled = [
            s["name"]
            for s in model_sites
            if not isinstance(s["scale"], int | float) or s["scale"] != 1
        ]
        raise ValueError(
            f"{outside}, enumerated in the model, stands outside the data plate, and the sites "
            f"{', '.join(map(repr, scaled))} have another scale (N/B). {_GLOBAL_ENUMERATION} "
            f"{SEE_TABLE}"
        ) from error


def global_enumerated(
    model_sites: Iterable[Any], guide_sites: Iterable[Any], elbo: Any, plates: Iterable[str]
) -> list[Any]:
    """List the latents outside the data plates that the ELBO sums out in the model."""
    guided, plates = {site["name"] for site in guide_sites}, set(plates)
    return [
        site
        for site in model_sites
        if not site["is_observed"]
        and site["name"] not in guided
        and is_enumerated(site, elbo)
        and not plates & {frame.name for frame in site["cond_indep_stack"]}
    ]


def described(site: Any) -> str:
    """Name a site with its kind, shape and plates, for an error."""
    kind = "observed" if site["is_observed"] else "latent"
    shape = tuple(getattr(site["value"], "shape", ()))
    stack = ", ".join(f"'{f.name}' of size {f.size}" for f in site["cond_indep_stack"])
    where = f"in plate {stack}" if stack else "in no plate"
    return f"{kind} site '{site['name']}' (shape {shape}, {where})"
