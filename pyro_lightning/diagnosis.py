"""Which site and which rows make a loss that is not finite."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pyro_lightning.batches import named_tensors

_SHOWN = 10

_LOOK_FURTHER = (
    "Look at these rows in your data; `pyro.poutine.trace(model).get_trace(*batch)` with "
    "`.format_shapes()` and `.compute_log_prob()` shows each site, and "
    "Trainer(detect_anomaly=True) shows the operation. A too large learning rate, or a scale "
    "parameter that reaches 0, does this to clean data."
)


def non_finite_report(inputs: Any, sites: Iterable[Any], plates: Iterable[str]) -> str | None:
    """Say which inputs and sites are not finite, in which rows of the batch, or None if none is.

    Args:
        inputs: The arguments of the model.
        sites: Messages of sample sites that ran.
        plates: Names of the data plates; rows are counted along them.
    """
    plates, found = set(plates), []
    args, kwargs = inputs
    named: Mapping[str, Any] = {**{f"argument {i}": a for i, a in enumerate(args)}, **kwargs}
    for name, value in named.items():
        for path, tensor in named_tensors(value, name):
            bad = ~torch.isfinite(tensor)
            if tensor.dim() and bad.any():
                found.append(f"{path} holds values that are not finite{_rows(bad, 0)}")
    with torch.no_grad():
        for site in sites:
            marked = _non_finite(site)
            if marked is not None and marked.any():
                dims = [f.dim for f in site["cond_indep_stack"] if f.name in plates and f.dim]
                where = _rows(marked, dims[0]) if dims and marked.dim() >= -dims[0] else ""
                found.append(f"the log-probability of site '{site['name']}' is not finite{where}")
    return f"{'; '.join(dict.fromkeys(found))}. {_LOOK_FURTHER}" if found else None


def _non_finite(site: Any) -> torch.Tensor | None:
    """Mark where a site's value or log-probability is not finite, in its batch shape."""
    value, fn = site["value"], site["fn"]
    if not isinstance(value, torch.Tensor):
        return None
    bad: torch.Tensor = ~torch.isfinite(value)
    if fn.event_dim:
        bad = bad.flatten(-fn.event_dim).any(-1)
    try:
        wrong = ~torch.isfinite(fn.log_prob(value))
    except ValueError:  # the distribution validates: the value is outside its support
        wrong = ~fn.support.check(value)
    return bad | wrong


def _rows(bad: torch.Tensor, dim: int) -> str:
    dim %= bad.dim()
    other = [d for d in range(bad.dim()) if d != dim]
    rows = (bad.any(dim=other) if other else bad).nonzero().flatten().tolist()
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f" in rows {', '.join(map(str, rows[:_SHOWN]))}{more} of the batch"
