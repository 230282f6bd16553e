"""Refusals of ELBOs whose value for the whole data set cannot be estimated from a batch."""

from collections.abc import Collection, Iterable
from typing import Any

from pyro.infer import (
    ELBO,
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceTMC_ELBO,
)

_NO_SUMS = (RenyiELBO, ReweightedWakeSleep, TraceTMC_ELBO, Trace_MMD, EnergyDistance)
_WHOLE = "or train on batches that hold all N rows"
_LOG_MEAN = "takes the logarithm of a mean over its particles"


def scale_of_whole(elbo: ELBO | EnergyDistance, sizes: Collection[int], batch_size: int) -> float:
    """Return N/B as it stands outside an ELBO that is no sum over rows; 1 for one that is.

    Args:
        elbo: The ELBO.
        sizes: Size N of each data plate and of each site that is scaled without one.
        batch_size: B.

    Raises:
        ValueError: When there is more than one size, and so no N.

    Example:
        >>> scale_of_whole(RenyiELBO(), [10], 2)
        5.0
    """
    if not isinstance(elbo, _NO_SUMS) or not sizes:
        return 1.0
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{type(elbo).__name__} is no sum over rows and can be scaled by one N/B only, but the "
            f"data plates have sizes {', '.join(map(str, sorted(set(sizes))))}. Use Trace_ELBO."
        )
    return max(sizes) / batch_size


def refuse_unscalable(
    elbo: ELBO | EnergyDistance,
    model_sites: Iterable[Any],
    guide_sites: Iterable[Any],
    plates: Collection[str],
    scale: float,
) -> None:
    r"""Refuse an ELBO that is no sum over rows where the model would need it to be.

    .. math:: \operatorname{E}_{\text{batch}} \log \frac{1}{K} \sum_k e^{(N/B) f_{\text{batch}, k}}
        \neq \log \frac{1}{K} \sum_k e^{f_k}

    so the logarithm of a mean over draws of a global latent cannot be estimated from B of N rows:
    in the mean of a Normal with N/B = 10 its optimum is an sd that is 2 (two particles) to 5
    (sixteen) times too wide. That of local latents can, row by row. Where N = B every row is
    there, and nothing is refused.

    Args:
        elbo: The ELBO.
        model_sites: Messages of the model's sites in one run.
        guide_sites: Messages of the guide's sites in one run.
        plates: Names of the data plates.
        scale: N/B, of :func:`scale_of_whole`.

    Raises:
        ValueError: Naming ELBO and site, with the reason and what serves instead.
    """
    if not isinstance(elbo, _NO_SUMS):
        return
    name, guide_sites = type(elbo).__name__, list(guide_sites)
    sites = [s for s in (*model_sites, *guide_sites) if not s["infer"].get("_deterministic")]
    latents = [s for s in sites if not _is_observed(s)]
    if isinstance(elbo, TraceTMC_ELBO):
        _refuse_what_tmc_gets_wrong(latents, guide_sites)
    if isinstance(elbo, Trace_MMD):
        _refuse_subsampled(name, latents, plates)
        for site in latents:
            if scale != 1 and _in_data_plate(site, plates):
                raise ValueError(
                    f"Trace_MMD takes the discrepancy of latent site '{site['name']}', which "
                    "stands in the data plate, over all rows at once: it is no sum over rows, and "
                    f"N/B can scale no part of it. Use Trace_ELBO, {_WHOLE}."
                )
        return
    _refuse_subsampled(name, sites, plates)
    if not plates:
        _refuse_hand_scaled(name, sites)
    if scale == 1:
        return
    if isinstance(elbo, EnergyDistance):
        raise ValueError(
            "EnergyDistance takes a power of the squared distance of all N rows at once, which is "
            f"no sum over rows and cannot be estimated from one N/B = {scale:g} times smaller. "
            f"Use Trace_ELBO, {_WHOLE}."
        )
    for site in sites:
        if isinstance(elbo, TraceTMC_ELBO):
            if site["infer"].get("enumerate") and not _in_data_plate(site, plates):
                raise ValueError(
                    f"TraceTMC_ELBO {_LOG_MEAN}, and '{site['name']}', which it draws several "
                    "times, stands outside the data plate: all N rows share that "
                    "logarithm, and a batch cannot estimate it. Let it draw that site once: leave "
                    f"infer={{'enumerate': ...}} to the latents inside the plate, {_WHOLE}."
                )
        elif not _in_data_plate(site, plates, vectorized=True):
            kind = "observed" if _is_observed(site) else "latent"
            raise ValueError(
                f"{name} {_LOG_MEAN}, and {kind} site '{site['name']}' does not stand in the data "
                "plate written `with pyro.plate(...)`: all N rows share that logarithm, and a "
                "batch cannot estimate it; a posterior would come out several times too wide. Use "
                "Trace_ELBO; or TraceTMC_ELBO, with infer={'enumerate': 'parallel', 'num_samples': "
                f"K}} at the latents inside the plate; {_WHOLE}."
            )


def _is_observed(site: Any) -> bool:
    # A phase that draws the observations itself marks them.
    return bool(site["is_observed"] or site["infer"].get("was_observed"))


def _in_data_plate(site: Any, plates: Collection[str], *, vectorized: bool = False) -> bool:
    frames = (frame for frame in site["cond_indep_stack"] if frame.name in plates)
    return any(frame.vectorized or not vectorized for frame in frames)


def _refuse_subsampled(name: str, sites: Iterable[Any], plates: Collection[str]) -> None:
    for site in sites:
        for frame in site["cond_indep_stack"]:
            if frame.name not in plates and frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"{name} is no sum over the subsampled plate '{frame.name}' in which site "
                    f"'{site['name']}' stands, and cannot be scaled from {frame.size} to "
                    f"{frame.full_size}. Use Trace_ELBO, or do not subsample this plate."
                )


def _refuse_hand_scaled(name: str, sites: Iterable[Any]) -> None:
    for site in sites:
        scale = site["scale"]
        if _is_observed(site) and not (isinstance(scale, int | float) and scale == 1):
            raise ValueError(
                f"{name} is no sum over rows, so that the scale of the model at observed site "
                f"'{site['name']}' would stand in the wrong place. Name the data plate by "
                "data_plate=..., or use Trace_ELBO."
            )


def _refuse_what_tmc_gets_wrong(latents: Iterable[Any], guide_sites: Iterable[Any]) -> None:
    for site in latents:
        infer = site["infer"]
        if infer.get("enumerate") and infer.get("num_samples") is None:
            raise ValueError(
                f"TraceTMC_ELBO counts the prior of site '{site['name']}' twice where the model "
                "enumerates all of its values, and never trains the guide where the guide does. "
                "Use TraceEnum_ELBO, or write infer={'enumerate': 'parallel', 'num_samples': K}."
            )
    for site in guide_sites:
        if not (_is_observed(site) or getattr(site["fn"], "has_rsample", False)):
            raise ValueError(
                f"TraceTMC_ELBO gives the guide no gradient for site '{site['name']}', since a "
                f"{type(site['fn']).__name__} cannot be reparametrised, and the guide would never "
                "train. Use Trace_ELBO or ReweightedWakeSleep; or TraceEnum_ELBO to sum it out."
            )
