"""Refusals: what cannot give the right posterior is an error before the first step."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from pyro.infer import (
    trace_elbo,
    trace_mean_field_elbo,
    traceenum_elbo,
    tracegraph_elbo,
)
from pyro.infer.trace_tail_adaptive_elbo import TraceTailAdaptive_ELBO
from pyro.optim import PyroOptim
from torch import nn

from pyro_lightning.handlers import DataPlateMessenger, observed
from pyro_lightning.losses import REPLACED, SERVED_NAMES, refuse_unserved
from pyro_lightning.params import trainable_leaves
from pyro_lightning.rank_zero import warn
from pyro_lightning.shapes import check_broadcast, check_growth, check_square
from pyro_lightning.structure import SEE_TABLE, check_enumeration, check_guide_sites

_JIT = (
    trace_elbo.JitTrace_ELBO,
    trace_mean_field_elbo.JitTraceMeanField_ELBO,
    traceenum_elbo.JitTraceEnum_ELBO,
    tracegraph_elbo.JitTraceGraph_ELBO,
)


def check_elbo(elbo: Any) -> None:
    """Refuse an ELBO that cannot be trained on batches, whatever the model.

    Raises:
        TypeError: Naming the ELBOs that are served.
    """
    name = type(elbo).__name__
    if isinstance(elbo, _JIT):
        raise TypeError(
            f"{name} does not support parameters that belong to a module, as they do here: use "
            f"{name.removeprefix('Jit')}(). To compile the loss: PyroSVIModule(..., compile=True)."
        )
    if isinstance(elbo, TraceTailAdaptive_ELBO):
        raise TypeError(
            "TraceTailAdaptive_ELBO has no value to report, and weighs its particles by their rank "
            f"over all rows, which a batch cannot estimate. Use one of {SERVED_NAMES}."
        )
    for cls in REPLACED:
        if isinstance(elbo, cls) and type(elbo) is not cls:
            raise TypeError(
                f"{name} is a subclass of {cls.__name__}, whose loss this library computes itself "
                f"so that it can be scaled: nothing of {name} would run. Use one of {SERVED_NAMES}."
            )
    refuse_unserved(elbo)
    nesting = getattr(elbo, "max_plate_nesting", None)
    if isinstance(nesting, float) and nesting.is_integer():
        # A command line reads it as a float, which Pyro's default is: infinity.
        elbo.max_plate_nesting = int(nesting)


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is no callable from parameters to a torch optimizer.

    Raises:
        TypeError: Saying what to write instead.
    """
    if isinstance(optimizer, PyroOptim):
        raise TypeError(
            "optimizer is one of pyro.optim; expected a callable from parameters to a torch "
            "optimizer: functools.partial(torch.optim.Adam, lr=1e-2)"
        )
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; expected a callable from parameters to a "
            "torch optimizer, since the guide's parameters do not exist yet: "
            "functools.partial(torch.optim.Adam, lr=1e-2)"
        )


def check_sites(
    model: DataPlateMessenger,
    guide: DataPlateMessenger,
    elbo: Any,
    plates: Iterable[str],
    run_shorter: Callable[[], list[Any]] | None,
) -> None:
    """Check the sites of one run of model and guide on one batch.

    Args:
        model: The handler under which the model ran.
        guide: The handler under which the guide ran.
        elbo: The ELBO.
        plates: Names of the data plates, or of the plates over the rows where none is named.
        run_shorter: As :func:`pyro_lightning.shapes.check_growth` needs it; None where a batch
            cannot be cut.

    Raises:
        ValueError: Naming site, shape, cause and remedy.
    """
    rows, named = model.batch_size, model.scale_sites
    check_guide_sites(model.sites, guide.sites, elbo)
    check_scales(model.sites, guide.sites, model.plates)
    check_broadcast(model.sites, plates, named)
    check_broadcast(guide.sites, plates)
    factors = {size / rows for size in (*model.plates.values(), *named.values())}
    check_enumeration(model.sites, guide.sites, elbo, plates, factors)
    if model.scaled_observations and run_shorter is not None and rows > 1:
        check_square(model.sites, plates, rows, run_shorter)
        check_growth(model.sites, plates, named, rows, run_shorter)


def check_scales(
    model_sites: Iterable[Any], guide_sites: Iterable[Any], plates: Iterable[str]
) -> None:
    """Check that model and guide scale each latent site alike, in this batch and in any other.

    Raises:
        ValueError: Naming the site, both scales and both stacks of plates. A guide plate of
            another name than the model's gives a wrong ELBO without an error in Pyro.
    """
    plates = set(plates)
    in_guide = {s["name"]: s for s in guide_sites if not s["is_observed"]}
    for site in model_sites:
        if site["is_observed"] or site["name"] not in in_guide:
            continue
        pair = site, in_guide[site["name"]]
        ours, theirs = (torch.as_tensor(s["scale"], dtype=torch.float64).cpu() for s in pair)
        # Where B = N the scales agree by chance; the plates do not.
        inside = [{f.name for f in s["cond_indep_stack"]} & plates for s in pair]
        if inside[0] != inside[1] or not torch.allclose(ours, theirs):
            stacks = [
                ", ".join(f"plate '{f.name}' of size {f.size}" for f in s["cond_indep_stack"])
                or "no plate"
                for s in pair
            ]
            raise ValueError(
                f"latent site '{site['name']}' has scale {ours.max().item():g} in the model "
                f"(in {stacks[0]}) but {theirs.max().item():g} in the guide (in {stacks[1]}): "
                "its two terms of the ELBO would not cancel. Give the guide the model's plates, by "
                "the same names and with the rows of the batch; scale only what stands in them. A "
                "weight of the KL by poutine.scale belongs around the latents of both. "
                f"{SEE_TABLE}"
            )


def warn_of_unscaled(model: DataPlateMessenger, plates: Collection[str], dataset_size: int) -> None:
    """Warn where a user asked for no scale and the model has latents that all rows share.

    Args:
        model: The handler under which the model ran, on one batch.
        plates: Names of the plates over its rows.
        dataset_size: N.
    """
    shared = [
        site["name"]
        for site in model.sites
        if not site["is_observed"]
        and not any(f.name in plates for f in site["cond_indep_stack"])
        # A latent of the rows need not stand in a plate.
        and not any(size % model.batch_size == 0 for size in site["value"].shape)
    ]
    by_hand = any(
        isinstance(site["scale"], torch.Tensor) or site["scale"] != 1
        for site in observed(model.sites)
    )
    if shared and not by_hand and model.batch_size < dataset_size:
        warn(
            f"data_plate=None scales nothing, and this model has latents that all rows share "
            f"({', '.join(map(repr, shared))}): their prior counts N/B = "
            f"{dataset_size / model.batch_size:g} times too much. Name the plate over the rows by "
            "data_plate, or the observed sites by scale_sites; or scale by svi.scale_factor(batch) "
            "in the model. If it is meant so, checks=False.",
            stacklevel=2,
        )


def warn_of_unmet(model: DataPlateMessenger, guide: DataPlateMessenger) -> None:
    """Warn of names of plates and sites that neither model nor guide has on the first batch.

    They may come in other batches. A name that is misspelt scales nothing; where nothing at all is
    scaled, that is an error in any case.
    """
    if not model.scaled_observations:
        return
    sites = [*model.sites, *guide.sites]
    met = {frame.name for site in sites for frame in site["cond_indep_stack"]}
    names = {site["name"] for site in sites}
    for argument, unmet, there in (
        ("data_plate", set(model.plates) - met, met),
        ("scale_sites", set(model.scale_sites) - names, names),
    ):
        # The plate that is named by default need not be there beside named sites.
        if unmet and (argument == "scale_sites" or len(unmet) < len(model.plates)):
            what = "plates" if argument == "data_plate" else "sites"
            warn(
                f"{argument} names {', '.join(map(repr, sorted(unmet)))}, which the model does not "
                f"have on the first batch; its {what} are {', '.join(map(repr, sorted(there)))}. "
                "What is not named there is not scaled by N/B.",
            )


def check_leaves(loss: torch.Tensor, module: nn.Module) -> None:
    """Check that everything that the loss could train is a parameter of the module.

    Raises:
        ValueError: Listing the shapes of the trainable tensors that would never move.
    """
    known = {id(parameter) for parameter in module.parameters()}
    lost = [leaf for leaf in trainable_leaves(loss) if id(leaf) not in known]
    if lost:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in lost)
        raise ValueError(
            f"the loss depends on {len(lost)} trainable tensor(s) of shape {shapes} that are no "
            "parameters of this module and would never train. Make such a tensor a pyro.param, or "
            "an nn.Parameter of an nn.Module, and do not hide a pyro.param by poutine.block. A "
            "network that a function makes anew at each call, or that could not be found, must be "
            "made outside of it and held by a variable that the function uses; or name it by "
            "pyro.module('net', net)."
        )
