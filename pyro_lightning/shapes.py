"""Refusals of rows in the wrong dimension: broadcast by accident, or outside the data plate."""

from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch.distributions import Independent

from pyro_lightning.structure import SEE_TABLE, described


def check_broadcast(
    sites: Iterable[Any], plates: Iterable[str], scale_sites: Iterable[str] = ()
) -> None:
    r"""Check that no term of the batch's rows is counted again by broadcasting.

    A mean of shape ``(B, 1)`` and data of shape ``(B,)`` make B times B log-probabilities. The sum
    counts each observation once where the data have every dimension that the log-probabilities
    have, or where a plate declares it:

    .. math:: \sum_{i=1}^{B} \log p(x_i) \neq \sum_{i=1}^{B} \sum_{j=1}^{B} \log p(x_i \mid \mu_j)

    A constant observation may be broadcast over the rows of its plate, and so may a
    ``pyro.factor``. Sites outside the data plates that are not named are passed over.

    Args:
        sites: Messages of the sites of one run, not enumerated.
        plates: Names of the data plates.
        scale_sites: Names of the sites outside them that are scaled too.

    Raises:
        ValueError: Naming site and shapes. Pyro checks no shapes without its validation, and with
            it none left of ``max_plate_nesting``.
    """
    plates, named = set(plates), set(scale_sites)
    for site in sites:
        rows = {f.size for f in site["cond_indep_stack"] if f.name in plates and f.dim is not None}
        if not rows and site["name"] not in named:
            continue
        shapes = _batch_shapes(site)
        if shapes is None or site["infer"].get("_deterministic"):
            continue
        value, whole = shapes
        for frame in site["cond_indep_stack"]:
            stands = frame.name in plates and frame.dim and frame.size > 0  # -1: of no size
            found = whole.get(frame.dim, 1) if stands else 1
            if found not in (1, frame.size):
                raise ValueError(
                    f"{described(site)} has a log-probability of shape {_tuple(whole)}: its "
                    f"dimension {frame.dim}, at which plate '{frame.name}' of size {frame.size} "
                    f"stands, holds {found}. Let the rows stand there in data and parameters, "
                    f"or give the plate another `dim`. {SEE_TABLE}"
                )
        extra = _undeclared(site, whole)
        if site["is_observed"] and site["value"].numel() != 1:
            wrong = bool(extra) and any(size != whole[d] for d, size in value.items())
        else:
            # Its value was drawn in, or means, every shape; only the rows again can be no choice.
            wrong = any(size in rows for size in extra.values())
        if wrong:
            dims = ", ".join(f"{dim} (size {size})" for dim, size in extra.items())
            raise ValueError(
                f"{described(site)} has a log-probability of shape {_tuple(whole)}: no plate "
                f"stands at dimension {dims}, so that its terms would be counted more than once. "
                "Shapes (B, 1) and (B,) broadcast to (B, B): give the data, the parameters and "
                "any mask one shape (`.squeeze(-1)`), or declare a dimension that is meant by "
                f"`.to_event(1)` or a plate of its own. {SEE_TABLE}"
            )
        if site["is_observed"] and _crossed(site):
            fn = site["fn"]
            raise ValueError(
                f"{described(site)} meets a distribution of batch shape {tuple(fn.batch_shape)} "
                f"and event shape {tuple(fn.event_shape)}: broadcasting would compare every row "
                f"with all. Give the data the shape {tuple(fn.batch_shape + fn.event_shape)}, by "
                f"`.unsqueeze(-1)` for example. {SEE_TABLE}"
            )


def check_square(
    model_sites: Iterable[Any],
    plates: Iterable[str],
    rows: int,
    run_shorter: Callable[[], list[Any]],
) -> None:
    r"""Check that the rows of an observation stand at the plate, where another dimension has B.

    Data of shape ``(B, B)`` in a plate at dimension -1 may be rows by columns, which would compare
    column j with what the model says of row j. With a row less, the plate's dimension tells.

    Args:
        model_sites: Messages of the model's sites in one run on B rows.
        plates: Names of the data plates.
        rows: B.
        run_shorter: As :func:`check_growth` needs it.

    Raises:
        ValueError: Naming site and shapes.
    """
    plates, model_sites = set(plates), list(model_sites)
    suspects: dict[str, Any] = {}
    for site in model_sites:
        shapes = _batch_shapes(site) if site["is_observed"] else None
        frames = [f for f in site["cond_indep_stack"] if f.name in plates and f.dim is not None]
        if shapes and frames and rows in _undeclared(site, shapes[0]).values():
            suspects[site["name"]] = site, frames[0].dim
    if not suspects:
        return
    error: Exception | None = None
    try:
        again = {s["name"]: s for s in run_shorter()}
    except Exception as raised:
        again, error = {}, raised
    for name, (site, dim) in suspects.items():
        shapes = _batch_shapes(again[name]) if name in again else None
        if shapes is None or shapes[0].get(dim, 1) not in (1, rows - 1):
            raise ValueError(
                f"{described(site)} holds {rows} at two dimensions, and not the rows of the batch "
                f"at dimension {dim}, where their plate stands: column j would be compared with "
                "what the model says of row j. Declare columns an event by `.to_event(1)`, or give "
                f"them a plate of their own. {SEE_TABLE}"
            ) from error


def _crossed(site: Any) -> bool:
    """Whether data and distribution hold the same rows in two dimensions of one event.

    Only where independent dimensions are declared an event do their shapes broadcast.
    """
    if not isinstance(site["fn"], Independent):
        return False
    shapes = site["value"].shape[::-1], (site["fn"].batch_shape + site["fn"].event_shape)[::-1]
    sizes = list(zip_longest(*shapes, fillvalue=1))
    ours = {value for value, other in sizes if other == 1}
    theirs = {other for value, other in sizes if value == 1}
    return bool(ours & theirs - {1})


def _batch_shapes(site: Any) -> tuple[dict[int, int], dict[int, int]] | None:
    """Shapes of a site's value without its event, and of its log-probability, by dimension.

    None where they cannot be told, or where the log-probability itself will raise.
    """
    fn, value = site["fn"], site["value"]
    if not isinstance(value, torch.Tensor) or not hasattr(fn, "event_shape"):
        return None
    own = value.shape[: max(value.dim() - len(fn.event_shape), 0)]
    weights = (w.shape for w in (site["mask"], site["scale"]) if isinstance(w, torch.Tensor))
    sizes = list(zip_longest(*(s[::-1] for s in (own, fn.batch_shape, *weights)), fillvalue=1))
    if any(len(set(size) - {1}) > 1 for size in sizes):
        return None
    whole = {-1 - i: max(size) for i, size in enumerate(sizes)}
    return {-1 - i: size[0] for i, size in enumerate(sizes)}, whole


def _undeclared(site: Any, shape: Mapping[int, int]) -> dict[int, int]:
    declared = {frame.dim for frame in site["cond_indep_stack"]}
    return {dim: size for dim, size in shape.items() if size > 1 and dim not in declared}


def _tuple(shape: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(shape[dim] for dim in sorted(shape))


def check_growth(
    model_sites: Iterable[Any],
    plates: Iterable[str],
    scale_sites: Iterable[str],
    rows: int,
    run_shorter: Callable[[], list[Any]],
) -> None:
    """Check that no site outside the data plate holds the rows of the batch.

    The model runs on a shorter batch, but only where a site outside has a dimension of size B.

    Args:
        model_sites: Messages of the sites of one run of the model on B rows.
        plates: Names of the data plates.
        scale_sites: Names of the sites outside them that are scaled too.
        rows: B.
        run_shorter: Runs the model on B - 1 rows, its latents held at the values that they had, and
            returns the messages of its sites.

    Raises:
        ValueError: Naming the site and its shapes: its terms are not scaled, though the rows are.
    """
    plates, named = set(plates), set(scale_sites)
    model_sites = list(model_sites)
    suspects = {
        site["name"]: _shapes(site)
        for site in model_sites
        if not (plates & {f.name for f in site["cond_indep_stack"]} or site["name"] in named)
        and not site["infer"].get("_deterministic")
        and any(rows in shape for shape in _shapes(site))
    }
    if not suspects:
        return
    messages = {site["name"]: site for site in model_sites}
    try:
        again = {s["name"]: _shapes(s) for s in run_shorter()}
    except Exception as error:
        site = messages[next(iter(suspects))]
        raise ValueError(
            f"{described(site)} stands outside the data plate and has a dimension of B = {rows}; "
            f"whether it grows with the batch is not known, since the model does not run on "
            f"{rows - 1} rows ({type(error).__name__}: {error}). If it grows, "
            f"{into_plate(site, plates)}. If its size is B by chance, let the model take any "
            f"number of rows, as a smaller last batch needs, or pass checks=False. {SEE_TABLE}"
        ) from error
    for name, before in suspects.items():
        if again.get(name) != before:
            site = messages[name]
            now = f"shape {again[name][-1]}" if name in again else "no such site"
            raise ValueError(
                f"{described(site)} stands outside the data plate and grows with the batch: shape "
                f"{before[-1]} with {rows} rows, {now} with {rows - 1}. Its terms would not be "
                "scaled by N/B, and those of the data plate are. To scale it as well, "
                f"{into_plate(site, plates)}. {SEE_TABLE}"
            )


def into_plate(site: Any, plates: set[str]) -> str:
    """Say how a site outside the data plates can come to be scaled as what is in them."""
    names = sorted(plates) or ["data"]
    ways = [f"move it into `with pyro.plate('{names[0]}', len(x))`"]
    if site["cond_indep_stack"]:
        names += [frame.name for frame in site["cond_indep_stack"]]
        ways.append(f"name its plate too: data_plate=({', '.join(map(repr, names))})")
    if site["is_observed"]:
        ways.append(f"name it: scale_sites=('{site['name']}',)")
    return ", or ".join(ways)


def _shapes(site: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the distribution, where it has one, and of the value."""
    fn, value = site["fn"], site["value"]
    # Events of length 0 are those of pyro.factor, whose batch is its log-factor's.
    own = [tuple(fn.batch_shape + fn.event_shape)] if hasattr(fn, "event_shape") else []
    return (*own, tuple(value.shape) if isinstance(value, torch.Tensor) else ())


class ShortenedValues(Messenger):
    """Gives latents the values that they had with more rows, cut to size.

    So no prior need be sampled, and values that do not grow with the batch stay what they were.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if msg["done"] or msg["is_observed"] or value is None or not hasattr(msg["fn"], "shape"):
            return
        shape = msg["fn"].shape()
        if len(shape) != value.dim():
            return
        msg["value"] = value[tuple(slice(size) for size in shape)]
        msg["done"] = True
