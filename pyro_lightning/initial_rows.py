"""Initial values that ``init_loc_fn`` of an autoguide gives: of each row, and views."""

from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal
from torch.distributions import biject_to, transform_to


def initial_rows(msg: Any, plates: Collection[str], identities: int) -> torch.Tensor | None:
    """Give a latent of rows the batch's part of an initial value that is of another size.

    Args:
        msg: The message of the site, with the value that ``init_loc_fn`` gave; it is cut to the
            first rows.
        plates: Names of the data plates.
        identities: How many rows there are.

    Returns:
        The value of all rows; None where it is as large as the batch, or not given.

    Raises:
        ValueError: Naming the site, when the value is neither of all rows nor one for each of them.
    """
    fn, value = msg["fn"], msg["value"]
    frames = [f for f in msg["cond_indep_stack"] if f.name in plates and f.dim is not None]
    if value is None or msg["is_observed"] or not frames or frames[0].size < 1:
        return None
    shape = tuple(fn.shape())
    dim = len(shape) - fn.event_dim + frames[0].dim
    if value.shape == shape or dim < 0:
        return None
    whole = (*shape[:dim], identities, *shape[dim + 1 :])
    try:
        full: torch.Tensor = value.detach().expand(whole)
    except RuntimeError as error:
        raise ValueError(
            f"init_loc_fn gives latent site '{msg['name']}' a value of shape {tuple(value.shape)}: "
            f"expected {whole}, one for each of all {identities} rows of the data plate "
            f"'{frames[0].name}', or one for all of them, {shape[dim + 1 :]}"
        ) from error
    first = torch.arange(shape[dim], device=value.device) % identities
    msg["value"] = full.index_select(dim, first)
    return full


def set_initial_rows(part: Any, values: Mapping[str, torch.Tensor]) -> None:
    """Start the parameters that an autoguide has of each row from values of all rows."""
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        holder = part.locs if isinstance(part, AutoNormal) else part
        owner = attrgetter(path)(holder) if path else holder
        if isinstance(part, AutoNormal):
            value = biject_to(part.prototype_trace.nodes[name]["fn"].support).inv(value)
        constraint, _ = owner._pyro_params[leaf]
        parameter = owner._parameters[f"{leaf}_unconstrained"]
        with torch.no_grad():
            parameter.copy_(transform_to(constraint).inv(value))


def give_own_memory(part: Any) -> None:
    """Give each entry of an autoguide's parameters memory of its own.

    ``init_to_mean`` of an expanded prior is a view in which all entries are one; Pyro makes it the
    parameter as it is, which no optimizer and no checkpoint can write to.
    """
    for parameter in part.parameters():
        steps = zip(parameter.stride(), parameter.shape, strict=True)
        if any(step == 0 and size > 1 for step, size in steps):
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
