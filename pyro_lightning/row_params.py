"""Refusals of hand-written parameters of rows that a batch would read at the wrong place."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from pyro_lightning.params import is_statement
from pyro_lightning.shapes import ShortenedValues
from pyro_lightning.structure import SEE_TABLE

_REMEDY = (
    "compute it from the row by a network; or give it one entry for each of all N rows, by "
    "pyro.param(name, value, event_dim=...) inside the data plate, with batches that tell their "
    "rows"
)


def check_param_growth(
    params: Iterable[Any],
    sites: Iterable[Any],
    of_rows: Collection[str],
    rows: int,
    run_shorter: Callable[[Messenger], dict[str, tuple[int, ...]]],
) -> None:
    """Check that no ``pyro.param`` statement has one entry for each row of a batch.

    Its entries would be those of the first batch's rows, and be taken for other rows in the next.
    Guide and model run anew on a shorter batch, but only where a value has a dimension of size B.

    Args:
        params: Messages of the ``pyro.param`` statements of one run.
        sites: Messages of the sites of that run.
        of_rows: Names of parameters that are known to have one entry for each row of all.
        rows: B.
        run_shorter: Runs guide and model on B - 1 rows under a handler, which gives the latents
            their values, with no parameters made yet; returns the shape of each parameter.

    Raises:
        ValueError: Naming the parameter and its shapes.
    """
    suspects = {
        param["name"]: tuple(param["value"].shape)
        for param in params
        if isinstance(param["value"], torch.Tensor)
        and rows in param["value"].shape
        and param["name"] not in of_rows
        and is_statement(param)  # a PyroModule's own parameter is of one size
    }
    if not suspects:
        return
    latents = {site["name"]: site["value"] for site in sites if not site["is_observed"]}
    try:
        again = run_shorter(ShortenedValues(latents))
    except Exception as error:
        name, shape = next(iter(suspects.items()))
        raise ValueError(
            f"pyro.param('{name}') has shape {shape} with B = {rows} rows in the batch; whether it "
            f"holds parameters of these rows is not known, since model and guide do not run on "
            f"{rows - 1} rows ({type(error).__name__}: {error}). If it does, {_REMEDY}. If its "
            "size is B by chance, let model and guide take any number of rows, as a smaller last "
            f"batch needs, or pass checks=False. {SEE_TABLE}"
        ) from error
    for name, shape in suspects.items():
        now = again.get(name, shape)
        if now != shape:
            raise ValueError(
                f"pyro.param('{name}') has shape {shape} with {rows} rows in the batch and {now} "
                f"with {rows - 1}: it would hold parameters of the first batch's rows, and take "
                f"them for other rows in the next. Instead, {_REMEDY}. {SEE_TABLE}"
            )
