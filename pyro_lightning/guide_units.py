"""What a change of a guide's parameter is large or small beside."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

_ADDED = "_unconstrained"  # what Pyro adds to the name of a parameter with a constraint


def units_of_parameters(guide: Any) -> dict[int, torch.Tensor]:
    r"""Find, for the parameters of Normal autoguides, the changes that matter as much as one sd.

    Of a location it is the guide's standard deviation :math:`\sigma`; of an unconstrained parameter
    :math:`\rho` of :math:`\sigma` the change of it that multiplies :math:`\sigma` by e,
    :math:`(d \log \sigma / d \rho)^{-1}`; of a Cholesky factor whose rows are in units of sds 1.

    Args:
        guide: A guide, which may hold others.

    Returns:
        By the ``id`` of a parameter, units of its shape; none of other guides' parameters.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> guide = AutoNormal(lambda: pyro.sample("w", dist.Normal(0., 1.)), init_scale=0.25)
        >>> _ = guide()
        >>> units = units_of_parameters(guide)
        >>> [round(float(units[id(parameter)]), 2) for parameter in guide.parameters()]
        [0.25, 1.13]
    """
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    with torch.enable_grad():
        return {id(own): unit.detach() for part in parts for own, unit in _units(part)}


def _units(part: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(part, AutoNormal):
        scales = dict(part.scales.named_parameters())
        for name, loc in part.locs.named_parameters():
            sd = attrgetter(name.removesuffix(_ADDED))(part.scales)
            yield loc, sd
            yield scales[name], _per_e(sd, scales[name])
    elif isinstance(part, AutoDiagonalNormal | AutoMultivariateNormal) and hasattr(part, "loc"):
        own = dict(part.named_parameters())
        sd = scale = part.scale
        if isinstance(part, AutoMultivariateNormal):
            sd = scale * part.scale_tril.norm(dim=-1)
            factor = own[f"scale_tril{_ADDED}"]
            yield factor, torch.ones_like(factor)
        yield part.loc, sd
        yield own[f"scale{_ADDED}"], _per_e(scale, own[f"scale{_ADDED}"])


def _per_e(scale: torch.Tensor, unconstrained: torch.Tensor) -> torch.Tensor:
    (slope,) = torch.autograd.grad(scale.log().sum(), unconstrained)
    return 1.0 / slope.abs()
