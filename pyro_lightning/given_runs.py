"""A run with latents of given values: which sites it meets, and what is read of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger

from pyro_lightning.handlers import is_subsample

Run = Callable[[], Any]
Sites = dict[str, Any]


class GivenMessenger(Messenger):
    """Gives latents their values, and draws what was observed, as ``poutine.uncondition`` does.

    Args:
        values: Values by site.
        mixed: For some of these sites, where their value counts; elsewhere they are drawn from the
            distribution at hand.
        unobserved: Whether observed sites are drawn, those of ``pyro.deterministic`` and
            ``pyro.factor`` excepted.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0., 1.))
        ...     return pyro.sample("x", dist.Delta(z), obs=x)
        >>> with GivenMessenger({"z": torch.tensor(2.)}, unobserved=True):
        ...     model(torch.tensor(5.))
        tensor(2.)
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        mixed: Mapping[str, torch.Tensor] | None = None,
        unobserved: bool = False,
    ) -> None:
        super().__init__()
        self.values = values
        self.mixed = {} if mixed is None else mixed
        self.unobserved = unobserved

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            return
        name = msg["name"]
        if name in self.values and not is_statement_of_value(msg):
            value = self.values[name]
            if name in self.mixed:
                value = torch.where(self.mixed[name], value, msg["fn"](*msg["args"]))
            msg["value"], msg["is_observed"], msg["done"] = value, True, False
        elif self.unobserved and is_observation(msg):
            # A dict of the user's own, which the next run has again.
            msg["infer"] = {**msg["infer"], "was_observed": True}
            msg["value"], msg["is_observed"], msg["done"] = None, False, False


def is_statement_of_value(site: Any) -> bool:
    """Whether a site is a ``pyro.deterministic`` or ``pyro.factor`` statement."""
    return bool(site["infer"].get("_deterministic")) or _is_factor(site)


def _is_factor(site: Any) -> bool:
    return isinstance(getattr(site["fn"], "base_dist", site["fn"]), Unit)


def is_observation(site: Any) -> bool:
    """Whether a site has a value that was observed, or had one before it was drawn."""
    known = site["is_observed"] or site["infer"].get("was_observed")
    return bool(known) and not is_statement_of_value(site)


def sites_of_run(run: Run, given: Messenger) -> Sites:
    """Run once under a handler; returns the messages of the sites by name."""
    nodes = poutine.trace(given(run)).get_trace().nodes
    return {n: s for n, s in nodes.items() if s["type"] == "sample" and not is_subsample(s)}


def value_of(site: Any) -> torch.Tensor:
    """Read the value of a site."""
    value: torch.Tensor = site["value"]
    return value


def log_prob_of(site: Any) -> torch.Tensor:
    """Read the log-density of a site, masked and without a scale: of its batch shape."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    masked: torch.Tensor = scale_and_mask(log_prob, mask=site["mask"])
    return masked


def event_dim_of(site: Any) -> int:
    """Count the dimensions of a site's value that are right of all plates.

    ``pyro.deterministic`` takes all of them for that unless it is told: the fewest are counted
    that leave left of them what fits the plates of the site.

    Example:
        >>> import pyro
        >>> with poutine.trace() as traced, pyro.plate("data", 5):
        ...     _ = pyro.deterministic("mean", torch.zeros(5, 3))
        >>> event_dim_of(traced.trace.nodes["mean"])
        1
    """
    event_dim: int = site["fn"].event_dim
    shape = site["value"].shape
    if not site["infer"].get("_deterministic") or event_dim < len(shape):
        return event_dim
    plates = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
    for few in range(len(shape) + 1):
        batch = shape[: len(shape) - few]
        sizes = {at - len(batch): size for at, size in enumerate(batch)}
        if all(size in (1, plates.get(dim, 1)) for dim, size in sizes.items()):
            return few
    return event_dim
