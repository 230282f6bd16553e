"""Which latents a guide computes from the data of its batch, and which from parameters alone."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from pyro_lightning.analytic_kl import point_of
from pyro_lightning.batches import map_tensors
from pyro_lightning.reruns import Handled, run_again
from pyro_lightning.rows import data_of
from pyro_lightning.shapes import ShortenedValues


def repeated_row(data: Any, rows: int, count: int) -> Any:
    """Put the first row of a batch in the place of ``count`` rows.

    Example:
        >>> repeated_row(torch.tensor([5, 6, 7]), 3, 2)
        tensor([5, 5])
    """

    def repeated(value: torch.Tensor) -> torch.Tensor:
        by_row = value.dim() > 0 and len(value) == rows
        return value[:1].expand(count, *value.shape[1:]).clone() if by_row else value

    return map_tensors(data, repeated)


def sites_that_read_data(
    module: Any, batch: Any, handled: Handled, guide_sites: Sequence[Any], names: Collection[str]
) -> set[str]:
    """Name the latents whose density in the guide depends on the data of the batch.

    The guide runs on the batch and on its first row in every row's place, with latents of the same
    values. Densities are compared and their gradients, too: an encoder whose last layer starts at
    zero, or a parameter that data index, tells nothing by its value.

    Args:
        module: A ``PyroSVIModule``.
        batch: A batch of two rows or more.
        handled: What keeps the parameters of model and guide the module's own.
        guide_sites: Messages of the sites of one run of the guide.
        names: The latents in question.
    """
    if not names:
        return set()
    data = data_of(batch)
    rows = module.num_rows(data)
    latents = {site["name"]: site["value"] for site in guide_sites if not site["is_observed"]}
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = []
    for each in (data, repeated_row(data, rows, rows)):
        values = ShortenedValues(latents)
        # One random state, so that dropout is no difference.
        met = run_again(
            module, module.guide, batch, handled, values, data=each, seed=0, gradient=True
        )
        found.append({s["name"]: s for s in met.sites if s["name"] in names})
    one, other = found
    return {
        name
        for name in names
        if name not in one
        or name not in other
        or not _alike(_signature(one[name], parameters), _signature(other[name], parameters))
    }


def _signature(site: Any, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """A site's log-density, or the point that it is; and the gradient of its weighted sum."""
    point = point_of(site["fn"])
    value: torch.Tensor = site["fn"].log_prob(site["value"]) if point is None else point.v
    if not value.requires_grad or not parameters:
        return [value.detach()]
    # Weights, so that a gradient tells which row it came from.
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device)
    total = (value * weights.reshape(value.shape)).sum()
    # Other sites may share what it was computed from.
    gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return [value.detach(), *gradients]


def _alike(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    if len(one) != len(other):
        return False
    for left, right in zip(one, other, strict=True):
        if left is None or right is None:
            if left is not right:
                return False
            continue
        if left.is_sparse and right.is_sparse:
            left, right = left.coalesce(), right.coalesce()
            if not torch.equal(left.indices(), right.indices()):
                return False
            left, right = left.values(), right.values()
        if left.shape != right.shape or not torch.allclose(left, right, equal_nan=True):
            return False
    return True


def row_dims(
    guide_sites: Sequence[Any], names: Collection[str], plates: Collection[str]
) -> dict[str, int]:
    """Find the dimension of the rows, from the left, in the value of each latent.

    Sites in a plate without a dimension, or a size, are left out.
    """
    found: dict[str, int] = {}
    for site in guide_sites:
        if site["name"] not in names:
            continue
        for frame in site["cond_indep_stack"]:
            if frame.name in plates and frame.dim is not None:
                dim = site["value"].dim() - site["fn"].event_dim + frame.dim
                if dim >= 0 and site["value"].shape[dim] == frame.size:
                    found[site["name"]] = dim
    return found


def row_dim(site: Any, plates: Collection[str]) -> int | None:
    """Find the dimension of the rows, from the right, in a site's batch shape."""
    if not hasattr(site["fn"], "event_dim"):
        return None
    for frame in site["cond_indep_stack"]:
        if frame.name in plates and frame.dim is not None:
            return int(frame.dim)
    return None


def repeated_latents(sites: Sequence[Any], plates: Collection[str]) -> dict[str, Any]:
    """Give each latent the value that it had, of rows that of the first in every row's place.

    Args:
        sites: Messages of the sites of one run.
        plates: Names of the plates over the rows of a batch.
    """
    values = {}
    for site in sites:
        if site["is_observed"]:
            continue
        value, dim = site["value"], row_dim(site, plates)
        if dim is not None and value.dim() >= site["fn"].event_dim - dim:
            at = dim - site["fn"].event_dim
            value = value.narrow(at, 0, 1).expand_as(value).clone()
        values[site["name"]] = value
    return values
