"""What a batch has observed, laid out as the draws that are put beside it."""

from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch.distributions import Independent

from pyro_lightning._upstream import mask_of_distribution
from pyro_lightning.batch_runs import Draws
from pyro_lightning.given_runs import event_dim_of, value_of
from pyro_lightning.predictive import observed_sites
from pyro_lightning.prepared import prepared


def observed_targets(
    module: Any, batch: Any, posterior: Draws, num_samples: int | None = None, local: str = "guide"
) -> dict[str, torch.Tensor]:
    """Return what was observed in a batch, with NaN where a mask leaves it out.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters.
        batch: B rows with what was observed, on its device.
        posterior: Draws of the global latents, of which the first is used.
        num_samples: Their number, needed where there are none.
        local: ``"guide"``; or ``"prior"``, to leave the guide out.

    Returns:
        ``(B, *other plates, *event)`` by observed site, as ``predictive_draws`` lays out a draw;
        floats where a mask leaves something out.

    Raises:
        ValueError: When nothing is observed.
    """
    found = {}
    with prepared(module, batch, posterior, num_samples, local, unobserved=False) as ready:
        for name, site in observed_sites(ready).items():
            place = ready.of_rows(site, value_of)
            value, seen = value_of(site).expand(place.layout.shape), entries_seen(site)
            if not bool(torch.as_tensor(seen).all()):
                value = value if value.is_floating_point() else value.float()
                value = torch.where(torch.as_tensor(seen, device=value.device), value, torch.nan)
            found[name] = value.movedim(place.dim, 0).clone()
    return found


def entries_seen(site: Any) -> bool | torch.Tensor:
    """Tell which entries of a value no mask leaves out, by ``poutine.mask`` or ``.mask``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> normal = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
        >>> with pyro.poutine.trace() as traced, pyro.poutine.mask(mask=torch.arange(2) < 1):
        ...     _ = pyro.sample("x", normal, obs=torch.ones(2, 3))
        >>> entries_seen(traced.trace.nodes["x"])
        tensor([[ True],
                [False]])
    """
    fn, mask = site["fn"], site["mask"]
    seen: bool | torch.Tensor = True
    if mask is not None:
        seen = _of_value(mask, event_dim_of(site))
    while isinstance(fn, MaskedDistribution | Independent):
        if isinstance(fn, MaskedDistribution):
            seen = seen & _of_value(mask_of_distribution(fn), fn.event_dim)
        fn = fn.base_dist
    return seen


def _of_value(mask: bool | torch.Tensor, event_dim: int) -> bool | torch.Tensor:
    if not isinstance(mask, torch.Tensor):
        return mask
    return mask.reshape(*mask.shape, *(1,) * event_dim)
