"""Which site and which rows make a loss that is not finite."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_lightning.batches import named_tensors
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.states import forked_noise

_SHOWN = 10

# What torch.distributions says where a parameter or a value is refused.
_VALIDATION = ("to satisfy the constraint", "to be within the support")

LOOK_FURTHER = (
    "Look at these rows in your data; `pyro.poutine.trace(model).get_trace(*batch)` with "
    "`.format_shapes()` and `.compute_log_prob()` shows each site, and "
    "Trainer(detect_anomaly=True) shows the operation. A too large learning rate, or a scale "
    "parameter that reaches 0, does this to clean data."
)


class NonFiniteLoss(ValueError):
    """A loss that is NaN or infinite.

    Attributes:
        rows: The rows of the batch that make it so; None where no row stands out.
    """

    rows: list[int] | None = None


def not_finite(message: str, rows: list[int] | None) -> NonFiniteLoss:
    """Make the error of a loss that is not finite."""
    error = NonFiniteLoss(message)
    error.rows = rows
    return error


@contextmanager
def explained(
    inputs: Any,
    handler: Callable[[], DataPlateMessenger],
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Add to an error of Pyro's validation which sites and rows are not finite.

    It meets a NaN before a loss exists, where a distribution is made or its log-probability taken,
    and knows neither the rows nor always the site: so guide and model run once more without it.
    Other errors pass: NaN may be meant, under a mask.
    """
    try:
        yield
    except ValueError as error:
        if not any(sentence in str(error) for sentence in _VALIDATION):
            raise
        in_model, in_guide = handler(), handler()
        try:
            with torch.no_grad(), pyro.validation_enabled(False), forked_noise():
                _run_freely(inputs, in_model(model), guide and in_guide(guide))
        except (ValueError, RuntimeError):
            pass  # what was met up to here is reported, with the first error as the cause
        report = non_finite_report(inputs, in_guide, in_model)
        if report:
            rows = rows_at_fault(inputs, in_guide, in_model)
            raise not_finite(f"the loss cannot be computed: {report}", rows) from error
        raise


def _run_freely(inputs: Any, model: Callable[..., Any], guide: Callable[..., Any] | None) -> None:
    args, kwargs = inputs
    if guide is not None:
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model = poutine.replay(model, trace=trace)
    model(*args, **kwargs)


def non_finite_report(inputs: Any, *handlers: DataPlateMessenger) -> str | None:
    """Say which inputs, parameters and sites are not finite, in which rows of the batch.

    Args:
        inputs: Positional and keyword arguments of the model.
        handlers: The handlers under which guide and model ran, with what they met.

    Returns:
        The sentence, or None where everything is finite.
    """
    found = [
        f"{path} holds values that are not finite{_rows(bad, 0)}"
        for path, bad in _bad_inputs(inputs)
    ]
    for param in (param for handler in handlers for param in handler.params):
        if isinstance(param["value"], torch.Tensor) and not param["value"].isfinite().all():
            found.append(f"parameter '{param['name']}' is not finite")
    with torch.no_grad():
        for site, marked, dim in _bad_sites(handlers):
            where = "" if dim is None else _rows(marked, dim)
            found.append(f"the log-probability of site '{site['name']}' is not finite{where}")
    return f"{'; '.join(dict.fromkeys(found))}. {LOOK_FURTHER}" if found else None


def rows_at_fault(inputs: Any, *handlers: DataPlateMessenger) -> list[int] | None:
    """Find the rows of a batch that make its loss not finite.

    Those whose log-probability is not; of these, those whose inputs are not, where there are any:
    a network may spread one row's NaN over all rows. NaN in inputs alone may be meant, under a
    mask.

    Args:
        inputs: Positional and keyword arguments of the model.
        handlers: The handlers under which guide and model ran, with what they met.

    Returns:
        The rows, or None where no row stands out from the others.
    """
    size = handlers[0].batch_size
    in_inputs = _marks([(bad, 0) for _, bad in _bad_inputs(inputs)], size)
    with torch.no_grad():
        found = [(marked, dim) for _, marked, dim in _bad_sites(handlers) if dim is not None]
    in_sites = _marks(found, size)
    if not in_sites.any():
        in_sites = in_inputs
    elif (in_sites & in_inputs).any():
        in_sites = in_sites & in_inputs
    elif in_sites.all() and size > 1:
        return None
    rows: list[int] = in_sites.nonzero().flatten().tolist()
    return rows or None


def _marks(found: list[tuple[torch.Tensor, int]], size: int) -> torch.Tensor:
    """Join what is marked to one mark a row; passes over what is not indexed by row."""
    marks = torch.zeros(size, dtype=torch.bool)
    for bad, dim in found:
        of_rows = _by_row(bad, dim)
        if len(of_rows) == size:
            marks |= of_rows.cpu()
    return marks


def _bad_inputs(inputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Find the tensors of arguments that are not finite, and mark where."""
    args, kwargs = inputs
    named: Mapping[str, Any] = {**{f"argument {i}": a for i, a in enumerate(args)}, **kwargs}
    for name, value in named.items():
        for path, tensor in named_tensors(value, name):
            bad = ~torch.isfinite(tensor)
            if tensor.dim() and bad.any():
                yield path, bad


def _bad_sites(
    handlers: Iterable[DataPlateMessenger],
) -> Iterator[tuple[Any, torch.Tensor, int | None]]:
    """Find the sites that are not finite; yields each, where, and the dimension of its rows."""
    for site, handler in ((site, each) for each in handlers for site in each.sites):
        marked = _non_finite(site)
        if marked is not None and marked.any():
            over_rows = set(handler.plates).difference(handler.columns)
            frames = [f for f in site["cond_indep_stack"] if f.name in over_rows]
            dims = [frame.dim for frame in frames if frame.dim]
            yield site, marked, dims[0] if dims and marked.dim() >= -dims[0] else None


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
    mask = site["mask"]
    return bad | wrong if mask is None else (bad | wrong) & torch.as_tensor(mask)


def _by_row(bad: torch.Tensor, dim: int) -> torch.Tensor:
    dim %= bad.dim()
    other = [d for d in range(bad.dim()) if d != dim]
    return bad.any(dim=other) if other else bad


def _rows(bad: torch.Tensor, dim: int) -> str:
    rows = _by_row(bad, dim).nonzero().flatten().tolist()
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f" in rows {', '.join(map(str, rows[:_SHOWN]))}{more} of the batch"
