"""Refusals of latents in the data plates of which an autoguide cannot keep one for each row."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch.distributions.constraints import Constraint


def check_columns(msg: Any, columns: Mapping[str, int]) -> None:
    """Check that a latent of an autoguide stands in whole plates of columns.

    Args:
        msg: The message of the site.
        columns: How many columns there are in all, by the name of their plate.

    Raises:
        ValueError: Naming site and plate.
    """
    for frame in msg["cond_indep_stack"]:
        known = columns.get(frame.name, frame.size)
        if frame.size != known:
            raise ValueError(
                f"latent site '{msg['name']}' stands in the data plate '{frame.name}', of which "
                f"this batch holds {frame.size} of {known}: an autoguide would keep parameters for "
                "the columns of its first batch and mix up those of every other. Hand over rows "
                "with all their columns, or write the guide of this site by hand."
            )


def check_row_site(msg: Any, plates: Collection[str]) -> None:
    """Check that a latent in a data plate has a value of each row, on a support that all share.

    Args:
        msg: The message of the site, after it ran.
        plates: Names of the data plates.

    Raises:
        ValueError: Naming the site. An autoguide keeps the support of its first batch, and would
            hold the rows of every other batch to the bounds of those.
    """
    fn, value = msg["fn"], msg["value"]
    for frame in msg["cond_indep_stack"]:
        if frame.name not in plates or frame.dim is None:
            continue
        if value.dim() < fn.event_dim - frame.dim:
            raise ValueError(
                f"latent site '{msg['name']}' has one value for all rows of the data plate "
                f"'{frame.name}', which has no size: write pyro.plate('{frame.name}', len(x)) for "
                "one of each row, or move the site out of the plate for one of all"
            )
        # Bounds that do not depend on the row have no such dimension, even in a plate.
        from_right = fn.event_dim - frame.dim
        if any(bound.dim() >= from_right for bound in _bounds(fn.support)):
            raise ValueError(
                f"the support of latent site '{msg['name']}' has bounds for each row: an autoguide "
                "would hold all rows to those of its first batch. Draw a latent of one support and "
                f"transform it: u = pyro.sample('{msg['name']}', dist.Uniform(0., 1.)), then u * x."
            )


def _bounds(support: Any) -> Iterator[torch.Tensor]:
    """Walk the tensors of a constraint and of those that it is made of."""
    for value in vars(support).values():
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, torch.Tensor):
                yield each
            elif isinstance(each, Constraint):
                yield from _bounds(each)
