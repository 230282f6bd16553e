"""Model or guide of a module, run once more with latents of given values."""

from collections.abc import Callable, Generator
from contextlib import nullcontext
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.rows import data_of
from pyro_lightning.states import evaluating, forked_noise

Handled = Callable[[Any], Callable[..., Any]]


def run_again(
    module: Any,
    part: Any,
    batch: Any,
    handled: Handled,
    values: Messenger,
    *,
    data: Any = None,
    seed: int | None = None,
    gradient: bool = False,
) -> DataPlateMessenger:
    """Run model or guide on a batch under a handler that gives latents their values.

    Args:
        module: A ``PyroSVIModule``.
        part: Its model or guide.
        batch: A batch of it, for its row numbers.
        handled: What keeps the parameters of model and guide the module's own.
        values: The handler that gives values.
        data: What is shown in place of the batch's data, of as many rows.
        seed: Where random numbers start from, so that two runs draw the same ones; they are put
            back afterwards. By default the run draws as any other does.
        gradient: Whether densities can be differentiated.

    Returns:
        The handler under which it ran, with the sites and parameters that it met.
    """
    data = data_of(batch) if data is None else data
    rows = module.num_rows(data)
    args, kwargs = module.model_inputs(data)
    met: DataPlateMessenger = module._handler(rows)()
    noise = nullcontext() if seed is None else forked_noise()
    with torch.set_grad_enabled(gradient), noise, module._rows_of(batch, rows), values:
        if seed is not None:
            torch.manual_seed(seed)
        met(handled(part))(*args, **kwargs)
    return met


def runs_without_data(module: Any, part: Any, count: int) -> Generator[list[Any], None, None]:
    """Run model or guide as after a fit, on the batch that stands for any; yields sites of runs.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters, which are taken as they are.
        part: Its model or guide.
        count: How many runs.
    """
    batch = module.transfer_batch_to_device(module._prototype, module.device, 0)
    batch, _, _ = module._batch_of_rows(batch, module.num_rows(data_of(batch)), None)
    with evaluating(module), module._isolated() as handled:
        for _ in range(count):
            yield run_again(module, part, batch, handled, Messenger()).sites
