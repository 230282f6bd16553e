"""Latents of rows that never trained: drawn from the prior, given the globals."""

from collections.abc import Callable, Collection
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger


class PriorMessenger(Messenger):
    """Draws latents of rows that never trained from the model, given the globals.

    Their guide is then the prior, so their own terms cancel: the draw is taken as given, without a
    term of its own.
    """

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.site_names = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.site_names and not msg["is_observed"]:
            msg["value"] = msg["fn"](*msg["args"], **msg["kwargs"])
            msg["is_observed"] = True
            msg["mask"] = False


def without_sites(guide: Callable[..., Any], sites: Collection[str]) -> Callable[..., Any]:
    """Hide latent sites of an autoguide from whoever runs it."""
    # AutoNormal draws a site from an auxiliary one.
    hidden = [*sites, *(f"{site}_unconstrained" for site in sites)]
    blocked: Callable[..., Any] = poutine.block(guide, hide=hidden)
    return blocked
