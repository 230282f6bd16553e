"""One run of guide and model on a batch, for the record of the sites that run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_lightning.batches import first_rows, map_tensors
from pyro_lightning.diagnosis import explained
from pyro_lightning.guides import make_prototypes, parts_of
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.posterior import draws_at_once, stands_in
from pyro_lightning.rows import data_of
from pyro_lightning.shapes import ShortenedValues
from pyro_lightning.tables import FullSizeMessenger, plates_of_prototype

Handled = Callable[[Any], Callable[..., Any]]


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
    with torch.no_grad(), explained((args, kwargs), handler, model):
        make_prototypes(
            module.guide,
            guide,
            lambda part, fn: FullSizeMessenger(part, plates, identities, columns)(
                handler()(handled(fn))
            ),
            partial(plates_of_prototype, parts_of(module.guide), plates, rows, identities),
            (args, kwargs),
        )
        with module._rows_of(batch, rows):
            trace = poutine.trace(in_guide(guide)).get_trace(*args, **kwargs)
        poutine.replay(in_model(model), trace=trace)(*args, **kwargs)
    return in_model, in_guide


def run_shorter(module: Any, batch: Any, handled: Handled, values: Messenger) -> list[Any]:
    """Run the model without the last row of the batch, under a handler that gives values."""
    data = data_of(batch)
    rows = module.num_rows(data) - 1
    args, kwargs = module.model_inputs(first_rows(data, rows))
    with torch.no_grad(), values, module._handler(rows)() as met:
        handled(module.model)(*args, **kwargs)
    sites: list[Any] = met.sites
    return sites


def globals_of_data(
    module: Any, batch: Any, handled: Handled, guide_sites: list[Any]
) -> tuple[str, ...]:
    """Name the latents outside the data plates that the guide computes from the batch.

    The guide runs again on a batch of the same shapes, the first row in every row's place, with the
    same values of these latents: their densities are then the same unless they follow the data.
    """
    plates = module._row_plates()
    sites = {
        site["name"]: site
        for site in guide_sites
        # Auxiliary sites too, from which an autoguide computes its latents.
        if not (site["is_observed"] or stands_in(site, plates)) and hasattr(site["fn"], "log_prob")
    }
    if not sites or draws_at_once(module.guide):  # an autoguide does not read its batch
        return ()
    data = data_of(batch)
    rows = module.num_rows(data)

    def repeated(value: torch.Tensor) -> torch.Tensor:
        by_row = value.dim() > 0 and len(value) == rows
        return value[:1].expand(value.shape).clone() if by_row else value

    args, kwargs = module.model_inputs(map_tensors(data, repeated))
    values = ShortenedValues({name: site["value"] for name, site in sites.items()})
    with torch.no_grad(), module._rows_of(batch, rows), values:
        again = module._handler(rows)()
        again(handled(module.guide))(*args, **kwargs)
    found = []
    with torch.no_grad():
        for site in again.sites:
            if site["name"] not in sites:
                continue
            before = sites[site["name"]]
            one, other = (s["fn"].log_prob(before["value"]) for s in (before, site))
            if one.shape != other.shape or not torch.allclose(one, other, equal_nan=True):
                found.append(site["name"])
    return tuple(found)
