"""Masks of latents: the guide's terms are masked as the model's are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch.distributions import Independent

from pyro_lightning._upstream import mask_of_distribution
from pyro_lightning.structure import SEE_TABLE, described

Mask = bool | torch.Tensor


def mask_of(site: Any) -> Mask:
    """Return the mask of a site, by ``poutine.mask`` and by ``.mask`` of its distribution.

    Raises:
        ValueError: For a mask within the event, of whose entries a guide has one density.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> with pyro.poutine.trace() as traced:
        ...     z = pyro.sample("z", dist.Normal(0., 1.).mask(False))
        >>> mask_of(traced.trace.nodes["z"])
        False
    """
    mask: Mask = True if site["mask"] is None else site["mask"]
    fn, within = site["fn"], False
    while isinstance(fn, MaskedDistribution | Independent):
        if isinstance(fn, MaskedDistribution):
            own: Mask = mask_of_distribution(fn)
            if within and isinstance(own, torch.Tensor) and own.numel() > 1:
                raise ValueError(
                    f"{described(site)} has a mask within its event, where a guide has one density "
                    "for all entries. Let a plate hold the entries: with "
                    f"pyro.plate('entries', K), sample '{site['name']}' without .to_event. "
                    f"{SEE_TABLE}"
                )
            mask = own if mask is True else mask & own
        else:
            within = True
        fn = fn.base_dist
    return mask


class CarriedMasks:
    """Gives sites of the guide the masks that the model's latents turn out to have.

    The guide runs first, so that its sites get a mask of entries which the run of the model then
    fills in; an ELBO takes the log-densities after both.

    Args:
        names: The latents whose masks are carried.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.))
        >>> def model():
        ...     with pyro.poutine.mask(mask=torch.tensor([True, False])):
        ...         pyro.sample("z", dist.Normal(torch.zeros(2), 1.))
        >>> model, guide = CarriedMasks(["z"]).around(model, guide)
        >>> trace = pyro.poutine.trace(guide).get_trace()
        >>> model()
        >>> trace.nodes["z"]["mask"]
        tensor([ True, False])
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        # For each latent the masks of its guide sites, each with the one that the guide gave it.
        self.held: dict[str, list[tuple[torch.Tensor, Mask]]] = {}

    def around(
        self, model: Callable[..., Any], guide: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Put model and guide under the handlers that read and give masks."""
        if not self.names:
            return model, guide
        return _ReadMasks(self)(model), _GiveMasks(self)(guide)


def carry_masks_(
    names: Iterable[str], model_sites: Iterable[Any], guide_sites: Iterable[Any]
) -> None:
    """Mask sites of a guide that has run as those of the model are, where they are named."""
    ours, latents = {site["name"]: site for site in model_sites}, _sites_of(names)
    for site in guide_sites:
        latent = latents.get(site["name"])
        if latent in ours:
            mask = torch.as_tensor(mask_of(ours[latent]))
            site["mask"] = mask if site["mask"] is None else mask & site["mask"]


def _sites_of(names: Iterable[str]) -> dict[str, str]:
    """Name the latent for each site of the guide that may hold its density."""
    # AutoNormal draws from the second; the third is the factor of analytic_kl.py.
    forms = ("{}", "{}_unconstrained", "_{}_density")
    return {form.format(name): name for name in names for form in forms}


class _GiveMasks(Messenger):
    def __init__(self, carried: CarriedMasks) -> None:
        super().__init__()
        self.carried = carried
        self.latents = _sites_of(carried.names)

    def __enter__(self) -> Any:
        self.carried.held = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        latent = self.latents.get(msg["name"])
        if latent is None:
            return
        mask = torch.ones(msg["fn"].batch_shape, dtype=torch.bool)
        own: Mask = True if msg["mask"] is None else msg["mask"]
        self.carried.held.setdefault(latent, []).append((mask, own))
        msg["mask"] = mask


class _ReadMasks(Messenger):
    def __init__(self, carried: CarriedMasks) -> None:
        super().__init__()
        self.carried = carried

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["name"] not in self.carried.names:
            return
        mask = torch.as_tensor(mask_of(msg))
        for held, own in self.carried.held.get(msg["name"], ()):
            try:
                held.copy_(mask.to(held.device) & torch.as_tensor(own, device=held.device))
            except RuntimeError as error:
                raise ValueError(
                    f"latent site '{msg['name']}' has a mask of shape {tuple(mask.shape)}, which "
                    f"does not fit its site in the guide, of batch shape {tuple(held.shape)}: the "
                    "guide's terms cannot be masked as the model's are. Give both one shape; with "
                    "a mask that depends on other latents, leave out vectorize_particles."
                ) from error
