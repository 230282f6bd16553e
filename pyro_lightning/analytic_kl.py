"""What an ELBO that takes the KL of a site in closed form needs of a guide."""

from typing import Any

import pyro
import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch.distributions import Independent

from pyro_lightning.handlers import is_subsample


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


class AnalyticKLMessenger(Messenger):
    r"""Makes ``TraceMeanField_ELBO`` right for points, and refuses draws that it cannot train.

    An autoguide draws an auxiliary site and hands the latent on as a ``Delta`` with the log-density
    of the transform between the two. Pyro's KL of a ``Delta`` is :math:`-\log p(v)`, without that
    log-density: a latent on a constrained support lost its Jacobian, and guides that scale or shift
    their auxiliary draws lost more. Here it becomes a factor of its own.

    Raises:
        ValueError: For a site that is not reparametrised, through which the likelihood gives the
            guide no gradient. Pyro says so with its validation on only.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or is_subsample(msg):
            return
        if not getattr(fn, "has_rsample", False):
            raise ValueError(
                f"TraceMeanField_ELBO gives the guide no gradient of the likelihood for site "
                f"'{msg['name']}', since a {type(fn).__name__} cannot be reparametrised. Use "
                "Trace_ELBO or TraceGraph_ELBO; or TraceEnum_ELBO to sum it out."
            )
        point = point_of(fn)
        if point is None or msg["infer"].get("is_auxiliary"):
            return
        # The plates inside of this handler have met the site; those outside will meet both.
        pyro.factor(f"_{msg['name']}_density", fn.log_prob(point.v), has_rsample=True)
        msg["fn"] = dist.Delta(point.v, 0.0, event_dim=fn.event_dim)
