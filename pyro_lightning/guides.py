"""What Pyro's autoguides need before they serve a model on mini-batches."""

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoCallable,
    AutoDiscreteParallel,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
)
from pyro.poutine.guide import GuideMessenger
from torch import nn
from torch.distributions import Distribution, Transform

from pyro_lightning._upstream import class_made_by
from pyro_lightning.devices import on_device
from pyro_lightning.handlers import DataPlateMessenger, observed
from pyro_lightning.structure import SEE_TABLE

_EXPECTED = (
    "guide must be an autoguide class, a functools.partial of one, a guide instance or a guide "
    "function"
)


def make_guide(guide: Any, model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the guide: a class, or a ``functools.partial`` of one, is called with the model.

    Raises:
        TypeError: For something that is no guide, and for Pyro's messenger guides.
        ValueError: For an autoguide that was copied or pickled, and has no model any more.
    """
    factory = class_made_by(guide)
    if isinstance(factory, type) and not any("__call__" in vars(c) for c in factory.__mro__):
        raise TypeError(f"{_EXPECTED}; got the class {factory.__name__}")
    made = guide(model) if isinstance(factory, type) else guide
    if isinstance(made, GuideMessenger):
        raise TypeError(
            f"{type(made).__name__} re-runs the model inside the guide and does not support "
            "module-local parameters in Pyro. Use AutoNormal or AutoMultivariateNormal."
        )
    if not callable(made):
        raise TypeError(f"{_EXPECTED}; got {type(made).__name__}")
    for part in parts_of(made):
        if part._model is None:
            raise ValueError(
                f"{type(part).__name__} has lost its model, which Pyro takes from an autoguide "
                "that is copied or pickled, as by save_hyperparameters(): call "
                "save_hyperparameters(ignore=['guide']) after super().__init__, or pass the class."
            )
    return made  # type: ignore[no-any-return]


def parts_of(guide: Any) -> list[Any]:
    """List the autoguides within a guide, itself included."""
    if not isinstance(guide, nn.Module):
        return []
    return [part for part in guide.modules() if isinstance(part, AutoGuide)]


@contextmanager
def prototype_model(guide: Any, handled: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Let the autoguides within a guide read the model's structure under our handlers.

    An autoguide runs its prototype under ``poutine.block``, where handlers around the guide are
    not seen; the model in its hands must carry them itself. It is given back afterwards.
    """
    parts = parts_of(guide)
    raw = [part._model for part in parts]
    for part, model in zip(parts, raw, strict=True):
        if model is not None:
            part._model = (handled(part, model[0]),)
    try:
        yield
    finally:
        for part, model in zip(parts, raw, strict=True):
            part._model = model


def make_prototypes(
    raw: Any,
    guide: Callable[..., Any],
    handled: Callable[[Any, Any], Any],
    plates: Callable[[], AbstractContextManager[None]],
    inputs: tuple[Any, Any],
) -> None:
    """Run the autoguides within a guide once, so that they have their parameters.

    Args:
        raw: The guide in whose parts they are.
        guide: The guide, under the handlers that it needs.
        handled: Puts the model in an autoguide's hands under handlers, from the two.
        plates: Makes the context in which autoguides make plates of all rows.
        inputs: Positional and keyword arguments of one batch.
    """
    if parts_of(raw):
        args, kwargs = inputs
        try:
            with prototype_model(raw, handled), plates(), poutine.block():
                guide(*args, **kwargs)
        except NotImplementedError as error:
            _refuse_sequential(parts_of(raw), error)
            raise


def _refuse_sequential(parts: list[Any], error: NotImplementedError) -> None:
    """Say which latent an autoguide meets in a sequential plate, if that is what it says."""
    for part in parts:
        nodes = {} if part.prototype_trace is None else part.prototype_trace.nodes
        for name, site in nodes.items():
            frames = site.get("cond_indep_stack", ()) if site["type"] == "sample" else ()
            for frame in frames:
                if not frame.vectorized and not site["is_observed"]:
                    raise ValueError(
                        f"latent site '{name}' stands in the sequential plate '{frame.name}' "
                        f"(`for ... in pyro.plate(...)`), which {type(part).__name__} does not "
                        f"serve. Write `with pyro.plate('{frame.name}', ...):`, or a guide of your "
                        "own with the same loop."
                    ) from error


def cut_plates(in_model: DataPlateMessenger) -> set[str]:
    """Name the data plates of which a batch holds a part: those of rows, and columns cut short."""
    columns = {name: in_model.plates[name] for name in in_model.columns}
    frames = (frame for site in in_model.sites for frame in site["cond_indep_stack"])
    short = {f.name for f in frames if f.name in columns and f.size != columns[f.name]}
    return (set(in_model.plates) - in_model.columns) | short


def row_plates(
    in_model: DataPlateMessenger, run_shorter: Callable[[], list[Any]] | None
) -> set[str]:
    """Name the plates over the rows of a batch, in a model whose data plate is not named.

    They are the plates of size B that an observed site stands in, and of another size on a shorter
    batch.

    Args:
        in_model: The handler under which the model ran.
        run_shorter: As :func:`pyro_lightning.shapes.check_growth` needs it; None where a batch
            cannot be cut, and all plates of size B are named.
    """
    rows, sites = in_model.batch_size, in_model.sites
    found = {f.name for s in observed(sites) for f in s["cond_indep_stack"] if f.size == rows}
    if not found or run_shorter is None or rows == 1:
        return found
    fixed = {f.name for s in run_shorter() for f in s["cond_indep_stack"] if f.size == rows}
    return found - fixed


def refuse_local_latents(
    guide: Any,
    guide_sites: Iterable[Any],
    plates: Iterable[str],
    served: Collection[tuple[str, str]] = (),
) -> None:
    """Refuse an autoguide with latents in the data plate that keeps none for other rows.

    Args:
        guide: The guide.
        guide_sites: Messages of the sites of one run of it.
        plates: Names of the data plates.
        served: Sites, each with its data plate, for all of which the guide keeps parameters.

    Raises:
        ValueError: Naming site and plate. Such a guide has one set of parameters for each row of
            its first batch, and would fit whatever rows later batches hold to them.
    """
    plates = set(plates)
    stacks = ((s["name"], f.name) for s in guide_sites for f in s["cond_indep_stack"])
    local = {name: at for name, at in stacks if at in plates and (name, at) not in served}
    for part in parts_of(guide):
        if isinstance(part, AutoGuideList | AutoCallable) or part.prototype_trace is None:
            continue
        # The names alone: some autoguides empty the nodes of their prototype.
        for name in part.prototype_trace.nodes:
            if name in local and isinstance(part, AutoDiscreteParallel):
                raise ValueError(
                    f"latent site '{name}' stands in the data plate '{local[name]}', and "
                    "AutoDiscreteParallel would keep one set of probabilities for each row of its "
                    "first batch and mix up the rows of every other. Leave the site out of the "
                    "guide and sum it out in the model, exactly: infer={'enumerate': 'parallel'} "
                    "there and elbo=TraceEnum_ELBO(). Or write an amortised guide: a function of "
                    f"the batch with `pyro.sample('{name}', ...)` inside "
                    f"`pyro.plate('{local[name]}', len(x))`, its probabilities computed from the "
                    f"row by a network. {SEE_TABLE}"
                )
            if name in local:
                raise ValueError(
                    f"latent site '{name}' stands in the data plate '{local[name]}', and "
                    f"{type(part).__name__} would keep one set of parameters for each row of its "
                    "first batch and mix up the rows of every other. AutoNormal and AutoDelta keep "
                    "parameters of every row; AutoGuideList joins one of them, over "
                    f"poutine.block(model, expose=['{name}']), to another guide of the global "
                    "latents. Or write an amortised guide: a function of the batch with "
                    f"`pyro.sample('{name}', ...)` inside `pyro.plate('{local[name]}', len(x))`, "
                    f"its parameters computed from the row by a network. {SEE_TABLE}"
                )


def refuse_unmade(module: Any) -> None:
    """Refuse to draw from a guide that has no parameters yet.

    Raises:
        RuntimeError: Saying how it comes to them.
    """
    if not module._initialised:
        raise RuntimeError(
            "the guide has no parameters yet: fit the module, or call loss(batch) once"
        )


def refuse_point(guide: Any) -> None:
    """Refuse draws of a guide that holds no more than a point so far.

    Raises:
        ValueError: For ``AutoLaplaceApproximation``, whose Normal is a guide of its own.
    """
    if any(isinstance(part, AutoLaplaceApproximation) for part in parts_of(guide)):
        raise ValueError(
            "AutoLaplaceApproximation trains the mode alone: its draws are that point. The "
            "posterior is svi.guide.laplace_approximation(*data), a guide of its own; run it on "
            "all N rows, with N = B in its plate, for the Hessian of the whole data set."
        )


class BackReferences:
    """Remembers what copying or pickling an autoguide takes from the live one.

    ``AutoGuide.__getstate__`` sets the guide's model and its master to None on the very object that
    is copied, by whatever path the copier reached it.
    """

    def __init__(self, guide: Any) -> None:
        self._saved = [(part, part._model, part.master) for part in parts_of(guide)]

    def __getstate__(self) -> list[Any]:
        # The module's parts were pickled before this, and lost both; a weak reference cannot be.
        self.restore()
        return [
            (part, model, None if master is None else master())
            for part, model, master in self._saved
        ]

    def __setstate__(self, state: list[Any]) -> None:
        self._saved = [
            (part, model, None if master is None else weakref.ref(master))
            for part, model, master in state
        ]

    def restore(self) -> None:
        """Put model and master back where they were lost."""
        for part, model, master in self._saved:
            if part._model is None:
                part._model, part.master = model, master

    def rebind(self, memo: dict[int, Any]) -> None:
        """Give the copies that a ``deepcopy`` made copies of the models."""
        for part, model, _ in self._saved:
            if id(part) in memo:
                memo[id(part)]._model = deepcopy(model, memo)


def move_prototypes_(guide: Any, device: torch.device) -> None:
    """Move the distributions that an autoguide remembers, whose supports hold tensors."""
    for part in parts_of(guide):
        if part.prototype_trace is not None:
            for site in part.prototype_trace.nodes.values():
                if "fn" in site:  # some autoguides empty the nodes of their prototype
                    site["fn"] = on_device(site["fn"], device)


def drop_weak_references_(module: nn.Module) -> None:
    """Drop what leads from a constrained value to its parameter, and cannot be pickled.

    Pyro hangs it on the value, which may be the parameter itself, and which the distributions that
    an autoguide remembers hold. The next run hangs it there anew.
    """
    found: list[Any] = list(module.parameters())
    for part in parts_of(module):
        if part.prototype_trace is not None:
            found += [site.get("fn") for site in part.prototype_trace.nodes.values()]
    while found:
        value = found.pop()
        if isinstance(value, torch.Tensor):
            value.__dict__.pop("unconstrained", None)
        elif isinstance(value, list | tuple):
            found += value
        elif isinstance(value, Distribution | Transform):
            found += vars(value).values()
