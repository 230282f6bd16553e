"""A table of every site of model and guide, to debug from."""

from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, overload

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_lightning.batches import map_tensors
from pyro_lightning.first_run import run_once
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.masked_latents import KEPT, find_masked
from pyro_lightning.masks import carry_masks_
from pyro_lightning.params import complete_contexts
from pyro_lightning.states import preserved_state
from pyro_lightning.structure import is_enumerated
from pyro_lightning.text_tables import Printable, Printed

_HEADINGS = ("site", "kind", "plates", "shape", "scale", "log p", "log q", "guide")


@dataclass(frozen=True)
class SiteRow:
    """One site of model or guide, or one parameter.

    Attributes:
        name: Name of the site, or of the parameter as in ``named_parameters()``.
        kind: ``global latent``, ``local latent`` (in a data plate), ``observed``,
            ``deterministic``, ``auxiliary`` or ``only in guide``, or ``parameter``.
        plates: Name and size of each plate around it, outermost first.
        shape: Shape of its value; of a parameter as it is stored, unconstrained.
        scale: What multiplies its log-probability; of a tensor of scales the largest.
        log_prob: The scaled sum of its log-probability in the model, in nats, as it enters the
            ELBO; None outside the model.
        log_q: The same in the guide; None outside it.
        guide: Who guides it: the autoguide that holds its parameters, another module by its
            class, ``guide function``, ``enumerated``, or ``-``.
        problem: Why a log-probability is missing, or nothing.
    """

    name: str
    kind: str
    plates: tuple[tuple[str, int], ...] = ()
    shape: tuple[int, ...] = ()
    scale: float | None = None
    log_prob: float | None = None
    log_q: float | None = None
    guide: str = "-"
    problem: str = ""

    def cells(self) -> tuple[str, ...]:
        """What is printed of each attribute."""
        plates = ", ".join(f"{name}: {size}" for name, size in self.plates)
        numbers = ("" if x is None else f"{x:.6g}" for x in (self.scale, self.log_prob, self.log_q))
        return (self.name, self.kind, plates or "-", str(self.shape), *numbers, self.guide)


class SiteTable(Printable, Sequence[SiteRow]):
    r"""The sites of one run of guide and model, a row each, in the order in which they ran.

    Values are one draw from the guide; an enumerated latent is drawn as well, not summed out. So

    .. math:: \sum \text{log\_prob} - \sum \text{log\_q}

    over the rows is the ELBO of this draw: a sum over N observations in nats, with those of the
    batch scaled by N/B.

    Example:
        >>> table = SiteTable([SiteRow("x", "observed", (("data", 2),), (2,), 5.0, -9.189)])
        >>> print(table)
        site  kind      plates   shape  scale  log p   log q  guide
        x     observed  data: 2  (2,)   5      -9.189         -
        >>> table["x"].scale
        5.0
    """

    def __init__(self, rows: Iterable[SiteRow], problems: Iterable[str] = ()) -> None:
        self.rows = tuple(rows)
        self.problems = tuple(problems)

    @overload
    def __getitem__(self, key: int | str) -> SiteRow: ...
    @overload
    def __getitem__(self, key: slice) -> "SiteTable": ...
    def __getitem__(self, key: int | str | slice) -> "SiteRow | SiteTable":
        """Find a row by number or name; a slice gives a table."""
        if isinstance(key, slice):
            return SiteTable(self.rows[key], self.problems)
        if isinstance(key, int):
            return self.rows[key]
        found = [row for row in self.rows if row.name == key]
        if not found:
            names = ", ".join(repr(row.name) for row in self.rows)
            raise KeyError(f"no site or parameter '{key}'; there are {names or 'none'}")
        return found[0]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SiteRow]:
        return iter(self.rows)

    def _printed(self) -> Printed:
        own = [f"{row.name}: {row.problem}" for row in self.rows if row.problem]
        return Printed(_HEADINGS, [row.cells() for row in self.rows], [*own, *self.problems])


def table_of_sites(module: Any, batch: Any) -> SiteTable:
    """Run guide and model once, and write down every site that ran, and every parameter.

    Args:
        module: A ``PyroSVIModule``. Where it has not made its parameters yet, a copy makes them.
        batch: A batch of it.
    """
    if not module._initialised:
        module = deepcopy(module)
    # Without validation, so that a value outside its support shows as a number.
    with (
        pyro.validation_enabled(False),
        torch.inference_mode(False),
        torch.no_grad(),
        preserved_state(module),
        module._isolated() as handled,
    ):
        batch = map_tensors(batch, lambda t: t.clone() if t.is_inference() else t)
        batch = module._with_rows(batch)
        model, guide, problems = _tolerant_run(module, batch, handled)
        sites = model.sites, guide.sites
        if not problems:
            masks = module._masks or find_masked(module, batch, handled, *sites, refuse=False)
            carry_masks_([name for name, state in masks.items() if state != KEPT], *sites)
        ours, theirs = ({s["name"]: s for s in each.sites} for each in (model, guide))
        names = dict.fromkeys([*ours, *theirs])
        rows = [_row(ours.get(name), theirs.get(name), model.plates, module) for name in names]
    parameters = (
        SiteRow(name, "parameter", shape=() if is_lazy(p) else tuple(p.shape))
        for name, p in module.named_parameters()
    )
    return SiteTable([*rows, *parameters], problems)


class _TolerantMessenger(DataPlateMessenger):
    """Notes the plates that a step would refuse, and goes on."""

    def __init__(self, problems: list[str], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.problems = problems

    def _refuse(self, problem: str) -> None:
        self.problems.append(problem)


def _tolerant_run(
    module: Any, batch: Any, handled: Any
) -> tuple[DataPlateMessenger, DataPlateMessenger, list[str]]:
    """Run guide and model as far as they go; returns their handlers, and what is wrong."""
    problems: list[str] = []
    made: list[DataPlateMessenger] = []

    def handler(*arguments: Any) -> DataPlateMessenger:
        made.append(_TolerantMessenger(problems, *arguments))
        return made[-1]

    def run() -> None:
        made.clear()
        problems.clear()
        run_once(module, batch, handled)

    module._makes_handler = handler
    try:
        complete_contexts(run)
    except (ValueError, RuntimeError) as error:
        if not any(each.sites for each in made[:2]):
            raise
        problems.append(f"what comes next does not run: {error}")
    finally:
        del module._makes_handler
    # The first two are those around model and guide.
    return made[0], made[1], list(dict.fromkeys(problems))


def _row(model_site: Any, guide_site: Any, plates: Iterable[str], module: Any) -> SiteRow:
    site = guide_site if model_site is None else model_site
    stack = site["cond_indep_stack"]
    if site["infer"].get("_deterministic"):
        kind = "deterministic"
    elif model_site is None:
        kind = "auxiliary" if site["infer"].get("is_auxiliary") else "only in guide"
    elif site["is_observed"]:
        kind = "observed"
    else:
        local = any(frame.name in plates for frame in stack)
        kind = "local latent" if local else "global latent"
    (log_prob, log_q), problems = _log_probs(model_site, guide_site)
    return SiteRow(
        name=site["name"],
        kind=kind,
        plates=tuple((frame.name, frame.size) for frame in stack),
        shape=tuple(getattr(site["value"], "shape", ())),
        scale=float(torch.as_tensor(site["scale"]).max()),
        log_prob=log_prob,
        log_q=log_q,
        guide=_guided_by(model_site, guide_site, module.guide, module.elbo),
        problem=problems,
    )


def _log_probs(*sites: Any) -> tuple[list[float | None], str]:
    """Sum each site's scaled log-probability; says of the ones that cannot be taken why."""
    sums: list[float | None] = []
    problems = []
    for site in sites:
        sums.append(None)
        if site is None:
            continue
        try:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
            sums[-1] = float(scale_and_mask(log_prob, site["scale"], site["mask"]).sum())
        except (RuntimeError, ValueError) as error:
            problems.append(f"the log-probability cannot be taken: {error}")
    return sums, "; ".join(problems)


def _guided_by(model_site: Any, guide_site: Any, guide: Any, elbo: Any) -> str:
    if guide_site is None:
        latent = not model_site["is_observed"]
        return "enumerated" if latent and is_enumerated(model_site, elbo) else "-"
    enumerated = ", enumerated" if is_enumerated(guide_site, elbo) else ""
    return _part_name(guide_site["name"], guide, model_site is not None) + enumerated


def _part_name(name: str, guide: Any, latent: bool) -> str:
    """Name the part of a guide that has a site: its class, and where it is in the guide."""
    if not isinstance(guide, nn.Module):
        return "guide function"
    parts = [(path, part) for path, part in guide.named_modules() if isinstance(part, AutoGuide)]
    callables = [part for part in parts if isinstance(part[1], AutoCallable)]
    # The names alone: some autoguides empty the nodes of their prototype.
    holding = [
        (path, part)
        for path, part in parts
        if not isinstance(part, AutoGuideList | AutoCallable)
        and part.prototype_trace is not None
        and name in part.prototype_trace.nodes
    ]
    rest = callables if latent and len(callables) == 1 else []
    for path, part in holding or rest:
        return f"{type(part).__name__} ({path})" if path else type(part).__name__
    return type(guide).__name__
