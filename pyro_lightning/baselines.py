"""Decaying-average baselines of TraceGraph_ELBO, kept out of Pyro's global store."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger
from torch import nn

# Pyro's name for the average of a site's downstream cost.
_PREFIX = "__baseline_avg_downstream_cost_"


class DecayingBaselines(nn.Module):
    """Holds the running average of each site's downstream cost, by site and shape.

    Pyro keeps one average of a site, in its global store, and fails where a batch has other rows.
    Here a ragged batch has an average of its own. Any baseline that does not depend on the draw
    leaves the gradient unbiased: these depend on earlier steps only.

    The averages are saved in the ``state_dict``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.averages: dict[tuple[Any, ...], torch.Tensor] = {}

    def get_extra_state(self) -> dict[tuple[Any, ...], torch.Tensor]:
        """Return the averages, by name of the site and shape."""
        return dict(self.averages)

    def set_extra_state(self, state: dict[tuple[Any, ...], torch.Tensor]) -> None:
        """Put saved averages in place."""
        self.averages = dict(state)

    @contextmanager
    def in_place_of_store(self) -> Iterator[None]:
        """Answer Pyro's reading of averages, and take what it writes back out of its store."""
        answered = _BaselineMessenger(self.averages)
        try:
            with answered:
                yield
        finally:
            store = pyro.get_param_store()
            for name, earlier in answered.earlier.items():
                if name in store:
                    value = detach_provenance(store[name]).detach()
                    key = (name.removeprefix(_PREFIX), *value.shape)
                    self.averages[key] = value
                    del store[name]
                if earlier is not None:
                    store[name] = earlier


class _BaselineMessenger(Messenger):
    """Answers the statements by which Pyro reads an average."""

    def __init__(self, averages: dict[tuple[Any, ...], torch.Tensor]) -> None:
        super().__init__()
        self.averages = averages
        self.earlier: dict[str, torch.Tensor | None] = {}

    def _pyro_param(self, msg: Any) -> None:
        if not msg["name"].startswith(_PREFIX):
            return
        name, initial = msg["args"][:2]
        store = pyro.get_param_store()
        if name not in self.earlier:
            self.earlier[name] = store[name].detach() if name in store else None
        average = self.averages.get((name.removeprefix(_PREFIX), *initial.shape), initial)
        msg["value"] = average.to(initial)
        msg["done"] = True
