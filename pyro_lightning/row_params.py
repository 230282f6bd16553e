"""Refusals of hand-written parameters of rows that a batch would read at the wrong place."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from pyro_lightning.shapes import ShortenedValues
from pyro_lightning.structure import SEE_TABLE


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
    }
    if not suspects:
        return
    latents = {site["name"]: site["value"] for site in sites if not site["is_observed"]}
    again = run_shorter(ShortenedValues(latents))
    for name, shape in suspects.items():
        now = again.get(name, shape)
        if now != shape:
            raise ValueError(
                f"pyro.param('{name}') has shape {shape} with {rows} rows in the batch and {now} "
                f"with {rows - 1}: it would hold parameters of the first batch's rows, and take "
                "them for other rows in the next. Compute it from the row by a network; or give it "
                "one entry for each of all N rows, by pyro.param(name, value, event_dim=...) "
                f"inside the data plate, with batches that tell their rows. {SEE_TABLE}"
            )


def check_param_rows(
    params: Iterable[Any],
    of_rows: Collection[str],
    identities: int,
    rows: int,
    reads_rows: Callable[[str], bool],
) -> None:
    """Check that no parameter of all N rows is read at the row numbers that a plate was given.

    ``with pyro.plate("data", N, subsample_size=len(x)) as i`` draws rows in Pyro; here the batch
    holds them, and ``i`` counts within it.

    Args:
        params: Messages of the ``pyro.param`` statements of one run.
        of_rows: Names of parameters that are read at the batch's own row numbers.
        identities: How many rows there are.
        rows: B.
        reads_rows: Whether the run reads a parameter at the plate's row numbers.

    Raises:
        ValueError: Naming the parameter.
    """
    if rows == identities:
        return
    for param in params:
        value, name = param["value"], param["name"]
        if not isinstance(value, torch.Tensor) or name in of_rows:
            continue
        if identities in value.shape and reads_rows(name):
            raise ValueError(
                f"parameter '{name}' (shape {tuple(value.shape)}) has one entry for each of "
                f"{identities} rows, and is read at the data plate's row numbers, which count "
                "within the batch, 0 to B-1. Write pyro.param(name, value, event_dim=...) "
                "inside the plate, with batches that tell their rows (ArrayDataModule, "
                "IndexedDataset); or let the batch hold its row numbers, and give them to the "
                f"plate: pyro.plate(..., N, subsample=rows). {SEE_TABLE}"
            )
