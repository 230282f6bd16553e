"""Model or guide run for many draws of its latents: one run a draw, or one in an outer plate."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count as numbers_from
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger

from pyro_lightning.analytic_kl import point_of
from pyro_lightning.given_runs import (
    GivenMessenger,
    Run,
    Sites,
    event_dim_of,
    is_statement_of_value,
    log_prob_of,
    sites_of_run,
    value_of,
)

_LEAST_TRIED = 3
DRAWS = "_num_draws"  # name of the outer plate


def number_to_try(sites: Sites) -> int:
    """Choose how few draws are run in both ways: not the size of a dimension of a site.

    An index that is meant for a dimension of that size would serve the draws, too.

    Example:
        >>> number_to_try({"x": {"value": torch.zeros(3, 4)}})
        5
    """
    sizes = {size for site in sites.values() for size in site["value"].shape}
    return next(number for number in numbers_from(_LEAST_TRIED) if number not in sizes)


def nesting_of(*runs: Sites) -> int:
    """Count the dimensions of all plates and batches of sites, which an outer plate stands left of.

    Args:
        *runs: Sites of runs for one draw.
    """
    found = [0]
    for site in (site for sites in runs for site in sites.values()):
        found += [-frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None]
        found.append(len(getattr(site["fn"], "batch_shape", ())))
    return max(found)


class Layout:
    """How what is read of a site is laid out in the run of one draw.

    Args:
        tensor: What was read.
        event_dim: How many of its dimensions are right of all plates.
    """

    def __init__(self, tensor: torch.Tensor, event_dim: int) -> None:
        self.shape = tuple(tensor.shape)
        self.batch_dims = len(self.shape) - event_dim

    def padded(self, draws: torch.Tensor, nesting: int) -> torch.Tensor:
        """Give draws, ``(S, *shape)``, the dimensions that they have in an outer plate."""
        ones = (1,) * (nesting - self.batch_dims)
        return draws.reshape(len(draws), *ones, *self.shape)

    def unpadded(self, tensor: torch.Tensor, count: int, nesting: int) -> torch.Tensor:
        """Bring what was read in an outer plate of S draws to ``(S, *shape)``.

        Raises:
            RuntimeError: When its shape is not that of S draws.
        """
        ones = (1,) * (nesting - self.batch_dims)
        return tensor.expand(count, *ones, *self.shape).reshape(count, *self.shape)


class ManyRuns:
    """Runs a model or guide for many draws.

    Args:
        run: The model or guide with its arguments, under the handlers that it needs.
        given: Makes the handler that gives values, from values by site.
        event_dims: How many dimensions of the values of a site are right of all plates, by name.
        nesting: Dimensions of all plates, which an outer plate stands left of.
    """

    def __init__(
        self,
        run: Run,
        given: Callable[[Mapping[str, torch.Tensor]], Messenger],
        event_dims: Mapping[str, int],
        nesting: int,
    ) -> None:
        self.run = run
        self.given = given
        self.event_dims = event_dims
        self.nesting = nesting

    def read(
        self,
        reader: Callable[[Any], torch.Tensor],
        layouts: Mapping[str, Layout],
        values: Mapping[str, torch.Tensor],
        count: int,
        at_once: bool,
    ) -> dict[str, torch.Tensor]:
        """Read something of sites for each draw.

        Args:
            reader: Reads the message of a site.
            layouts: How that is laid out in one run, for the sites that are read.
            values: Values that are given, ``(S, *shape of the site)``.
            count: S.
            at_once: Whether one run in an outer plate serves all draws.

        Returns:
            ``(S, *shape)`` by site.
        """
        if at_once:
            sites = self._at_once(values, count)
            return {
                name: layout.unpadded(reader(sites[name]), count, self.nesting)
                for name, layout in layouts.items()
            }
        found: dict[str, list[torch.Tensor]] = {name: [] for name in layouts}
        for draw in range(count):
            sites = sites_of_run(self.run, self.given(draw_of(values, draw)))
            for name, layout in layouts.items():
                found[name].append(reader(sites[name]).expand(layout.shape))
        return {name: torch.stack(each) for name, each in found.items()}

    def _at_once(self, values: Mapping[str, torch.Tensor], count: int) -> Sites:
        with self.several(values, count) as given:
            return sites_of_run(self.run, given)

    @contextmanager
    def several(self, values: Mapping[str, torch.Tensor], count: int) -> Iterator[Messenger]:
        """Run within, in an outer plate, what is under the handler that this yields.

        Args:
            values: Values that are given, ``(S, *shape of the site)``.
            count: S.
        """
        padded = {
            name: _layout(draws, self.event_dims[name]).padded(draws, self.nesting)
            for name, draws in values.items()
        }
        with pyro.plate(DRAWS, count, dim=-1 - self.nesting):
            yield self.given(padded)

    def why_not_at_once(self, values: Mapping[str, torch.Tensor], count: int) -> str | None:
        """Say why one run in an outer plate is not one run for each draw; None where it is.

        A few draws are run in both ways, with equal values at all sites, and the densities that
        these have compared.

        Args:
            values: Values that are given, ``(S, *shape of the site)``, a few draws.
            count: S.
        """
        looped = [
            sites_of_run(self.run, self.given(draw_of(values, draw))) for draw in range(count)
        ]
        first = looped[0]
        if any(sites.keys() != first.keys() for sites in looped):
            return "its sites are not the same in all draws"
        shapes = [{name: site["value"].shape for name, site in run.items()} for run in looped]
        if any(each != shapes[0] for each in shapes):
            return "its values are not of the same shape in all draws"
        drawn = {n: s for n, s in first.items() if not is_statement_of_value(s)}
        event_dims = {name: site["fn"].event_dim for name, site in drawn.items()}
        everything = {
            name: torch.stack([sites[name]["value"] for sites in looped]) for name in drawn
        }
        again = ManyRuns(self.run, GivenMessenger, {**self.event_dims, **event_dims}, self.nesting)
        try:
            sites = again._at_once(everything, count)
            for name in first:
                if name not in sites:
                    return f"site '{name}' is missing in a run for several draws"
                reader, event_dim = _compared(first[name])
                one = torch.stack([reader(run[name]) for run in looped])
                layout = _layout(one, event_dim)
                other = layout.unpadded(reader(sites[name]), count, self.nesting)
                if not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
                    return f"site '{name}' has another density in a run for several draws"
        except Exception as error:  # of a model that was not written for this
            return f"{type(error).__name__}: {str(error).split(chr(10))[0]}"
        return None


def _compared(site: Any) -> tuple[Callable[[Any], torch.Tensor], int]:
    """What of a site tells its distribution, and how many dimensions of it are right of plates."""
    if site["infer"].get("_deterministic"):
        return value_of, event_dim_of(site)
    if point_of(site["fn"]) is not None:
        return _point, site["fn"].event_dim
    return log_prob_of, 0


def _point(site: Any) -> torch.Tensor:
    point: torch.Tensor = point_of(site["fn"]).v
    return point


def _layout(draws: torch.Tensor, event_dim: int) -> Layout:
    return Layout(draws[0], event_dim)


def draw_of(values: Mapping[str, torch.Tensor], draw: int) -> dict[str, torch.Tensor]:
    """Take the values of one draw."""
    return {name: value[draw] for name, value in values.items()}
