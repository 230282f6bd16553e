"""One run of guide and model on a batch, for the record of the sites that run."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_lightning.batches import first_rows
from pyro_lightning.diagnosis import explained
from pyro_lightning.guides import make_prototypes, parts_of
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.indexed_params import indexed_params
from pyro_lightning.initial_rows import give_own_memory, set_initial_rows
from pyro_lightning.params import ParamStoreModule, RowsOfBatch
from pyro_lightning.posterior import draws_at_once, is_latent, stands_in
from pyro_lightning.reads_data import (
    repeated_latents,
    repeated_row,
    row_dims,
    sites_that_read_data,
)
from pyro_lightning.reruns import Handled, run_again
from pyro_lightning.rows import ChosenBatch, IndexedBatch, data_of
from pyro_lightning.shapes import ShortenedValues
from pyro_lightning.tables import FullSizeMessenger, plates_of_prototype


def run_once(
    module: Any, batch: Any, handled: Handled
) -> tuple[DataPlateMessenger, DataPlateMessenger]:
    """Run the guide, and the model with what the guide drew; lazy parameters exist afterwards.

    Args:
        module: A ``PyroSVIModule``.
        batch: A batch of it.
        handled: What keeps the parameters of model and guide the module's own.

    Returns:
        The handlers under which model and guide ran, with the sites that they met.
    """
    data = data_of(batch)
    rows, plates = module.num_rows(data), module._row_plates()
    args, kwargs = module.model_inputs(data)
    handler, identities = module._handler(rows), module._count_rows()
    in_model, in_guide = handler(), handler()
    columns = {name: in_model.plates[name] for name in module._columns}
    model, guide = handled(module.model), handled(module.guide)
    known = RowsOfBatch(plates, torch.arange(rows) % identities, identities)
    readers = []

    def read_whole(part: Any, fn: Any) -> Callable[..., Any]:
        readers.append(FullSizeMessenger(part, plates, identities, columns))
        read: Callable[..., Any] = readers[-1](handler()(handled(fn)))
        return read

    with torch.no_grad(), explained((args, kwargs), handler, model):
        with module._known_rows(known):
            make_prototypes(
                module.guide,
                guide,
                read_whole,
                partial(plates_of_prototype, parts_of(module.guide), plates, rows, identities),
                (args, kwargs),
            )
        for reader in readers:
            set_initial_rows(reader.part, reader.initial)
        for part in parts_of(module.guide):
            give_own_memory(part)
        with module._rows_of(batch, rows):
            trace = poutine.trace(in_guide(guide)).get_trace(*args, **kwargs)
            poutine.replay(in_model(model), trace=trace)(*args, **kwargs)
    return in_model, in_guide


def run_shorter(module: Any, batch: Any, handled: Handled, sites: list[Any]) -> list[Any]:
    """Run the model without the last row of the batch, with the latents of a run on all rows."""
    values = ShortenedValues({s["name"]: s["value"] for s in sites if not s["is_observed"]})
    data = data_of(batch)
    rows = module.num_rows(data) - 1
    args, kwargs = module.model_inputs(first_rows(data, rows))
    with torch.no_grad(), values, module._handler(rows)() as met:
        handled(module.model)(*args, **kwargs)
    found: list[Any] = met.sites
    return found


def run_alike(
    module: Any,
    batch: Any,
    handled: Handled,
    sites: list[Any],
    plates: Collection[str],
    count: int,
    seed: int,
) -> list[Any]:
    """Run the model on copies of the first row, with latents of equal values, from a seed.

    Args:
        module: A ``PyroSVIModule``.
        batch: A batch of it.
        handled: What keeps the parameters of model and guide the module's own.
        sites: Messages of the sites of one run of the model.
        plates: Names of the plates over the rows of a batch.
        count: How many rows.
        seed: The seed.
    """
    data = data_of(batch)
    alike = repeated_row(data, module.num_rows(data), count)
    chosen = ChosenBatch(alike, torch.zeros(count, dtype=torch.long))
    values = ShortenedValues(repeated_latents(sites, plates))
    return run_again(module, module.model, chosen, handled, values, seed=seed).sites


def globals_of_data(
    module: Any, batch: Any, handled: Handled, guide_sites: list[Any]
) -> tuple[str, ...]:
    """Name the latents outside the data plates that the guide computes from the batch.

    The guide runs again on a batch of the same shapes, the first row in every row's place.
    """
    plates = module._row_plates()
    sites = [site for site in guide_sites if not stands_in(site, plates)]
    if not sites or draws_at_once(module.guide):  # an autoguide does not read its batch
        return ()
    data = data_of(batch)
    rows = module.num_rows(data)
    # Auxiliary sites too, from which an autoguide computes its latents.
    latents = {site["name"]: site["value"] for site in sites if not site["is_observed"]}
    alike, values = repeated_row(data, rows, rows), ShortenedValues(latents)
    again = run_again(module, module.guide, batch, handled, values, data=alike)
    changed = _changed(sites, again.sites)
    others = {site["name"] for site in sites if is_latent(site)}.difference(changed)
    reading = sites_that_read_data(module, batch, handled, guide_sites, others)
    return (*changed, *sorted(reading))


def rows_of_sites(
    module: Any, batch: Any, handled: Handled, guide_sites: list[Any]
) -> dict[str, int]:
    """Find the hand-written latents of rows that do not depend on the batch's data.

    Returns:
        The dimension of the rows, from the left, in the value of each.
    """
    data = data_of(batch)
    rows = module.num_rows(data)
    if rows == 1:  # one row tells nothing of the others
        return {}
    dims = row_dims(guide_sites, module._sites_of_data, module._row_plates())
    reading = sites_that_read_data(module, batch, handled, guide_sites, dims)
    return {name: dim for name, dim in dims.items() if name not in reading}


def _changed(before: list[Any], after: list[Any]) -> tuple[str, ...]:
    """Name the sites whose density, at the values of the first run, is another in the second."""
    known = {site["name"]: site for site in before if hasattr(site["fn"], "log_prob")}
    found = []
    with torch.no_grad():
        for site in after:
            if site["name"] not in known:
                continue
            fn, value = known[site["name"]]["fn"], known[site["name"]]["value"]
            one, other = (each.log_prob(value) for each in (fn, site["fn"]))
            if one.shape != other.shape or not torch.allclose(one, other, equal_nan=True):
                found.append(site["name"])
    return tuple(found)


def params_of_shorter(
    module: Any, batch: Any, handled: Handled, values: Messenger
) -> dict[str, tuple[int, ...]]:
    """Run guide and model anew without the last row of the batch; returns their params' shapes."""
    data = data_of(batch)
    rows = module.num_rows(data) - 1
    shorter = first_rows(data, rows)
    store, module._pyro_param_store = module._pyro_param_store, ParamStoreModule()
    found = {}
    try:
        batch = ChosenBatch(shorter, torch.arange(rows) % module._count_rows())
        for part in (module.guide, module.model):
            met = run_again(module, part, batch, handled, values)
            found.update({param["name"]: tuple(param["value"].shape) for param in met.params})
    finally:
        module._pyro_param_store = store
    return found


def indexed_by_data(module: Any, batch: IndexedBatch) -> tuple[str, ...]:
    """Name the dense parameters of all rows that the data of a batch index."""
    data, served = batch.data, module._row_parameters()
    rows = module.num_rows(data)

    def losses(repeated: bool) -> torch.Tensor:
        shown = repeated_row(data, rows, rows) if repeated else data
        with torch.enable_grad():
            loss: torch.Tensor = module._run(batch._replace(data=shown)).loss
        return loss

    others = {name: p for name, p in module.named_parameters() if name not in served}
    return indexed_params(others, {module._known_size(), module._count_rows()}, rows, losses)
