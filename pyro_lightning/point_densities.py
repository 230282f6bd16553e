"""Densities of the points that a guide draws, kept for ELBOs that take an analytic KL."""

from typing import Any

import pyro
import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch.distributions import Independent


def point_of(fn: Any) -> Any:
    """Return the ``Delta`` that a distribution is, within ``to_event`` or not; None for another.

    Example:
        >>> import torch
        >>> point_of(dist.Delta(torch.zeros(2)).to_event(1)).v
        tensor([0., 0.])
    """
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn if isinstance(fn, dist.Delta) else None


class PointDensityMessenger(Messenger):
    r"""Moves the log-density of a guide's ``Delta`` into a factor of its own.

    An autoguide draws an auxiliary site and hands the latent on as a ``Delta`` with the log-density
    of the transform between the two. Pyro's KL of a ``Delta`` is :math:`-\log p(v)`, without that
    log-density: by ``TraceMeanField_ELBO`` a latent on a constrained support lost its Jacobian, and
    guides that scale or shift their auxiliary draws lost more.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        point = point_of(fn)
        if point is None or msg["is_observed"] or msg["infer"].get("is_auxiliary"):
            return
        # The plates inside of this handler have met the site; those outside will meet both.
        pyro.factor(f"_{msg['name']}_density", fn.log_prob(point.v), has_rsample=True)
        msg["fn"] = dist.Delta(point.v, 0.0, event_dim=fn.event_dim)
