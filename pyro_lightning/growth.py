"""Refusals of terms outside the data plate that are as many as the rows of the batch."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask

from pyro_lightning.guides import parts_of
from pyro_lightning.shapes import into_plate
from pyro_lightning.structure import SEE_TABLE, described

RunAlike = Callable[[int, int], list[Any]]


def check_totals(
    model_sites: Sequence[Any],
    plates: Collection[str],
    scale_sites: Collection[str],
    rows: int,
    run_alike: RunAlike,
) -> None:
    r"""Check that what is observed outside the data plate does not count the rows of the batch.

    .. math:: f(x_1, \dots, x_1) \text{ of } B \text{ rows} = f(x_1, \dots, x_1)
        \text{ of } \lfloor B/2 \rfloor

    holds for the mean of a batch and for what does not depend on it, but not for a sum over it, in
    one ``pyro.factor`` or in a site for each row.

    Args:
        model_sites: Messages of the sites of one run of the model on B rows.
        plates: Names of the data plates.
        scale_sites: Names of the sites outside them that are scaled too.
        rows: B, at least 2.
        run_alike: Runs the model on as many copies of the first row as are asked for, from a seed;
            returns the messages of its sites.

    Raises:
        ValueError: Naming the site: its terms are not scaled, though those of the data plate are.
    """
    outside = [
        site
        for site in _outside(model_sites, plates)
        if site["is_observed"] and site["name"] not in scale_sites
    ]
    latents = _suspects(_outside(model_sites, plates), rows)
    if not (outside or latents):
        return
    runs = _runs(run_alike, (rows, 0), (rows, 1), (rows // 2, 0))
    if runs is None:
        return
    names = {site["name"] for site in outside}
    full, again, half = ({n: _total(s) for n, s in run.items() if n in names} for run in runs)
    if _alike(full, again) and not _alike(full, half):
        name = next(n for n in full if n not in half or not _close(full[n], half[n]))
        site = next(site for site in outside if site["name"] == name)
        raise ValueError(
            f"{described(site)} stands outside the data plate and its log-probability grows with "
            f"the batch: of {rows} equal rows it is {full[name]:.6g}, of {rows // 2} "
            f"{'there is none' if name not in half else format(half[name], '.6g')}. It would not "
            f"be scaled by N/B, and the terms of the data plate are. To scale it as well, "
            f"{into_plate(site, set(plates))}; what the batch only estimates, make a mean over "
            f"its rows. {SEE_TABLE}"
        )
    for site in latents:
        if _grows(site, runs[0], runs[2]):
            raise ValueError(
                f"{described(site)} stands outside the data plate and grows with the batch: with "
                f"{rows // 2} rows in place of {rows} it is another, or none. Its terms would not "
                "be scaled by N/B, and those of the data plate are. To scale it as well, "
                f"{into_plate(site, set(plates))}. {SEE_TABLE}"
            )


def check_latents_of_no_plate(
    guide: Any, model_sites: Sequence[Any], plates: Collection[str], rows: int, run_alike: RunAlike
) -> None:
    """Check that no autoguide holds latents that grow with the batch, where nothing is scaled.

    Args:
        guide: The guide.
        model_sites: Messages of the sites of one run of the model on B rows.
        plates: Names of the plates over the rows.
        rows: B, at least 2.
        run_alike: As :func:`check_totals` needs it.

    Raises:
        ValueError: Naming the site. Its parameters would be those of the first batch's rows.
    """
    prototypes = [p.prototype_trace for p in parts_of(guide) if p.prototype_trace is not None]
    held = {name for trace in prototypes for name in trace.nodes}
    latents = _suspects(_outside(model_sites, plates), rows)
    latents = [site for site in latents if site["name"] in held]
    runs = _runs(run_alike, (rows, 0), (rows // 2, 0)) if latents else None
    for site in latents if runs else ():
        if runs and _grows(site, *runs):
            raise ValueError(
                f"{described(site)} grows with the batch, and an autoguide would keep one set of "
                "parameters for the rows of its first batch and mix up those of every other. Put "
                f"it into the plate over the rows, `with pyro.plate('data', len(x))`, named by "
                "data_plate=...: AutoNormal and AutoDelta then keep parameters of every row. Or "
                f"write an amortised guide. {SEE_TABLE}"
            )


def _outside(sites: Sequence[Any], plates: Collection[str]) -> list[Any]:
    return [
        site
        for site in sites
        if not site["infer"].get("_deterministic")
        and not any(frame.name in plates for frame in site["cond_indep_stack"])
    ]


def _suspects(outside: Sequence[Any], rows: int) -> list[Any]:
    """List the latents that may be as many as the rows: by a dimension, or by their number."""
    latents = [site for site in outside if not site["is_observed"]]
    if len(latents) >= rows:
        return latents
    return [site for site in latents if any(size and size % rows == 0 for size in _shape(site))]


def _shape(site: Any) -> tuple[int, ...]:
    return tuple(getattr(site["value"], "shape", ()))


def _runs(run_alike: RunAlike, *asked: tuple[int, int]) -> list[dict[str, Any]] | None:
    try:
        return [{site["name"]: site for site in run_alike(*each)} for each in asked]
    except (ValueError, RuntimeError, IndexError):
        # Such a batch is not the user's, and may be one that no model takes.
        return None


def _grows(site: Any, full: dict[str, Any], half: dict[str, Any]) -> bool:
    name = site["name"]
    return name in full and (name not in half or _shape(full[name]) != _shape(half[name]))


def _total(site: Any) -> float:
    with torch.no_grad():
        log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        return float(torch.as_tensor(scale_and_mask(log_prob, site["scale"], site["mask"])).sum())


def _alike(one: dict[str, float], other: dict[str, float]) -> bool:
    """Whether the totals of all sites are equal; of what is not finite nothing is known."""
    return _close(sum(one.values()), sum(other.values()))


def _close(one: float, other: float) -> bool:
    difference = abs(one - other)
    return not difference > 1e-3 * max(abs(one), abs(other)) or difference == float("inf")
