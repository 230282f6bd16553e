"""One run of guide and model on a batch, for the record of the sites that run."""

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pyro_lightning.batches import first_rows
from pyro_lightning.diagnosis import explained
from pyro_lightning.guides import prototype_model
from pyro_lightning.handlers import DataPlateMessenger

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
    args, kwargs = module.model_inputs(batch)
    handler = module._handler(batch)
    in_model, in_guide = handler(), handler()
    model, guide = handled(module.model), handled(module.guide)
    with (
        torch.no_grad(),
        explained((args, kwargs), handler, model),
        prototype_model(module.guide, lambda fn: handler()(handled(fn))),
    ):
        trace = poutine.trace(in_guide(guide)).get_trace(*args, **kwargs)
        poutine.replay(in_model(model), trace=trace)(*args, **kwargs)
    return in_model, in_guide


def run_shorter(module: Any, batch: Any, handled: Handled, values: Messenger) -> list[Any]:
    """Run the model without the last row of the batch, under a handler that gives values."""
    batch = first_rows(batch, module.num_rows(batch) - 1)
    args, kwargs = module.model_inputs(batch)
    with torch.no_grad(), values, module._handler(batch)() as met:
        handled(module.model)(*args, **kwargs)
    sites: list[Any] = met.sites
    return sites
