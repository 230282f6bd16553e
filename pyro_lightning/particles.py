"""Log-densities of an ELBO's particles, kept apart where they are independent."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace

from pyro_lightning.analytic_kl import point_of


class Particles(NamedTuple):
    """Log-densities of K particles, each of shape ``(K, *independent)`` or broadcast to it.

    The independent dimensions are those of the plates that every site of model and guide stands
    in: the rows of a model whose every site is in the data plate, and none where a site is not.
    Everything else is summed.
    """

    log_model: torch.Tensor
    log_guide: torch.Tensor
    score: torch.Tensor
    """Log-density of those draws of the guide that carry no gradient of their own."""


def draw_particles(
    elbo: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    detached: bool = False,
) -> Particles:
    """Run guide and model for each particle of an ELBO, in a loop or in one plate, as it says.

    Args:
        elbo: Says how many particles, and whether to run them in one plate.
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        detached: Whether the draws carry no gradient, so that the guide's parameters are reached
            by its log-density alone.

    Returns:
        Their log-densities.

    Raises:
        ValueError: When detached draws are points that parameters move, naming the site.
    """
    in_plate = elbo.vectorize_particles and elbo.num_particles > 1
    if in_plate:
        if elbo.max_plate_nesting == float("inf"):
            elbo._guess_max_plate_nesting(model, guide, args, kwargs)
        model, guide = (elbo._vectorized_num_particles(fn) for fn in (model, guide))
    terms = []
    for _ in range(1 if in_plate else elbo.num_particles):
        drawn = guide
        if detached:
            # Replayed, not detached afterwards: a log-density that the guide computes on the way,
            # such as an autoguide's Jacobian, would keep the gradient of the draw.
            with torch.no_grad():
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
            # Copies, since a transform remembers its last value and where that came from: without
            # the gradient, which its inverse has.
            for site in _sites(trace):
                site["value"] = site["value"].clone()
            drawn = poutine.replay(guide, trace=trace)
        traces = get_importance_trace("flat", elbo.max_plate_nesting, model, drawn, args, kwargs)
        model_sites, guide_sites = (_sites(trace) for trace in traces)
        if detached:
            _refuse_points(elbo, guide_sites)
        terms.append(_terms(model_sites, guide_sites))
    if in_plate:
        return terms[0]
    return Particles(*map(torch.stack, zip(*terms, strict=True)))


def log_mean_exp(values: torch.Tensor) -> torch.Tensor:
    """Logarithm of the mean of exponentials over the first dimension.

    Example:
        >>> float(log_mean_exp(torch.tensor([2.0, 2.0])))
        2.0
    """
    return values.logsumexp(0) - math.log(len(values))


def _refuse_points(elbo: ELBO, guide_sites: Sequence[Any]) -> None:
    """Refuse points that parameters move: a density at a draw that is held fixed ignores them."""
    for site in guide_sites:
        point = point_of(site["fn"])
        if point is not None and not site["is_observed"] and point.v.requires_grad:
            name = type(elbo).__name__
            raise ValueError(
                f"{name} trains a guide through its log-density at draws that are held fixed, and "
                f"site '{site['name']}' of the guide is a point (a Delta) that parameters move: "
                "that density would leave them untrained, or train them wrongly. Use Trace_ELBO; "
                "or a guide that draws from its parameters' distribution, such as AutoNormal."
            )


def _sites(trace: Any) -> list[Any]:
    # A deterministic statement is a site of log-density 0, wherever it stands.
    return [
        site
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site["infer"].get("_deterministic")
    ]


def _terms(model_sites: Sequence[Any], guide_sites: Sequence[Any]) -> Particles:
    # By name and dimension: the frames of a plate differ in model and guide where one states N.
    plates = [
        {(frame.name, frame.dim) for frame in site["cond_indep_stack"] if frame.vectorized}
        for site in [*model_sites, *guide_sites]
    ]
    kept = {dim for _, dim in set.intersection(*plates)} if plates else set()
    # It is the number 0 where the draw carries a gradient.
    scores = (site["score_parts"].score_function for site in guide_sites)
    terms = (
        [site["log_prob"] for site in model_sites],
        [site["log_prob"] for site in guide_sites],
        [score for score in scores if isinstance(score, torch.Tensor)],
    )
    none = terms[0][0].new_zeros(()) if terms[0] else torch.zeros(())
    totals = (sum((_summed(value, kept) for value in each), start=none) for each in terms)
    # One shape, since a guide without latents has none, and particles come first when stacked.
    return Particles(*torch.broadcast_tensors(*totals))  # type: ignore[no-untyped-call]


def _summed(value: torch.Tensor, kept: set[int]) -> torch.Tensor:
    others = [dim for dim in range(-value.dim(), 0) if dim not in kept]
    return value.sum(others, keepdim=True) if others else value
