"""Posterior, predictions, likelihoods and data as the groups of ArviZ's schema."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from pyro_lightning.arguments import shortly
from pyro_lightning.arrays import as_numpy
from pyro_lightning.batch_runs import HowToRun
from pyro_lightning.given_runs import is_observation, is_statement_of_value
from pyro_lightning.plates import read_names
from pyro_lightning.posterior import stands_in
from pyro_lightning.predictive import (
    draws_vectorise,
    global_draws,
    log_likelihood_of,
    predictive_draws,
)
from pyro_lightning.prepared import local_sites
from pyro_lightning.reruns import runs_without_data
from pyro_lightning.retold import telling
from pyro_lightning.rows import data_of
from pyro_lightning.targets import observed_targets

GROUPS = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "prior",
    "observed_data",
    "constant_data",
)
_OF_DATA = ("observed_data", "constant_data")

Array = np.ndarray[Any, Any]
Groups = dict[str, dict[str, Array]]


def read_groups(groups: str | Sequence[str]) -> tuple[str, ...]:
    """Read names of groups, in the order of the schema.

    Raises:
        TypeError: For what is no name.
        ValueError: For other names than those that are made.

    Example:
        >>> read_groups(["prior", "posterior"])
        ('posterior', 'prior')
    """
    names = read_names(groups, "groups")
    unknown = [name for name in names if name not in GROUPS]
    if unknown or not names:
        raise ValueError(f"groups must be some of {', '.join(GROUPS)}; got {shortly(groups)}")
    return tuple(name for name in GROUPS if name in names)


def collect_groups(
    module: Any,
    batches: Iterable[Any],
    num_samples: int,
    groups: Sequence[str] = GROUPS,
    *,
    local_latents: bool = False,
) -> Groups:
    """Draw S times, and collect over batches what the groups hold.

    One set of draws of the global latents is shared by all groups and batches.

    Args:
        module: A ``PyroSVIModule`` that has trained.
        batches: Rows in the order in which they are to stand, on its device.
        num_samples: S.
        groups: Names of the groups to make.
        local_latents: Whether the posterior holds the latents of rows, too.

    Returns:
        Arrays by group and variable: ``(1, S, ...)``, with a chain of one; in groups of data
        without these two dimensions.
    """
    posterior = global_draws(module, num_samples)
    found: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in groups}
    of_rows = set(groups).difference(("posterior", "prior"))
    local = sorted(local_sites(module)) if local_latents and "posterior" in groups else []
    if of_rows or local:
        parts = _Parts(module, posterior, num_samples, of_rows, local)
        for batch in batches:
            for group, variables in parts.of_batch(batch).items():
                for name, tensor in variables.items():
                    found.setdefault(group, {}).setdefault(name, []).append(tensor.cpu())
    made: Groups = {}
    for group, listed in found.items():
        dim = 0 if group in _OF_DATA else 1
        made[group] = {name: as_numpy(torch.cat(each, dim)) for name, each in listed.items()}
    if "constant_data" in groups:
        # Of all rows: a field and what is observed may be equal in a batch by chance.
        seen = made.get("observed_data", {}).values()
        made["constant_data"] = {
            name: field
            for name, field in made["constant_data"].items()
            if not any(_holds(field, each) for each in seen)
        }
    if "posterior" in groups:
        made["posterior"].update({name: as_numpy(each) for name, each in posterior.items()})
    if "prior" in groups:
        made["prior"] = {n: as_numpy(d) for n, d in prior_draws(module, num_samples).items()}
    for group, arrays in made.items():
        if group not in _OF_DATA:
            made[group] = {name: array[None] for name, array in arrays.items()}
    # A model without latents outside the data plate has no prior of them, and so on.
    return {group: made[group] for group in groups if made[group]}


class _Parts:
    """What each batch adds to the groups."""

    def __init__(
        self,
        module: Any,
        posterior: Mapping[str, torch.Tensor],
        num_samples: int,
        groups: set[str],
        local: list[str],
    ) -> None:
        self.module, self.groups, self.local = module, groups, local
        self.shared = posterior, num_samples
        self.how = HowToRun()
        self.predicted: list[str] | None = None

    def of_batch(self, batch: Any) -> dict[str, dict[str, torch.Tensor]]:
        module, groups, shared = self.module, self.groups, self.shared
        if self.local or groups.difference(_OF_DATA):
            self.how.find_out(partial(draws_vectorise, module, batch, *shared))
        found: dict[str, dict[str, torch.Tensor]] = {}
        if "posterior_predictive" in groups or self.local:
            with telling("group 'posterior_predictive'"):
                draws = self._draws(batch)
            latents = {name: draws.pop(name) for name in self.local}
            found["posterior"] = latents
            if "posterior_predictive" in groups:
                found["posterior_predictive"] = draws
        if "log_likelihood" in groups:
            with telling("group 'log_likelihood'"):
                found["log_likelihood"] = log_likelihood_of(module, batch, *shared, how=self.how)
        seen = observed_targets(module, batch, *shared) if groups.intersection(_OF_DATA) else {}
        if "observed_data" in groups:
            found["observed_data"] = seen
        if "constant_data" in groups:
            found["constant_data"] = _fields_of_rows(data_of(batch), module)
            found.setdefault("observed_data", seen)
        return found

    def _draws(self, batch: Any) -> dict[str, torch.Tensor]:
        """Draw latents of rows and what depends on them together."""
        module, shared, how = self.module, self.shared, self.how
        if not self.local:
            return predictive_draws(module, batch, *shared, how=how)
        if self.predicted is None:
            few = {name: draws[:1] for name, draws in shared[0].items()}
            self.predicted = list(predictive_draws(module, batch, few, 1))
        sites = [*self.local, *self.predicted]
        return predictive_draws(module, batch, *shared, sites=sites, how=how)


def _fields_of_rows(data: Any, module: Any) -> dict[str, torch.Tensor]:
    """Return the fields of a batch that have a name and a value of each row."""
    if not isinstance(data, Mapping):
        return {}
    rows = module.num_rows(data)
    tensors = {n: v for n, v in data.items() if isinstance(v, torch.Tensor) and v.dim()}
    return {name: value for name, value in tensors.items() if len(value) == rows}


def _holds(field: Array, observed: Array) -> bool:
    """Whether a field is what was observed, and anything where a mask has left that out."""
    if field.shape != observed.shape:
        return False
    seen = ~np.isnan(observed)
    return bool(seen.any()) and np.allclose(field[seen], observed[seen])


def prior_draws(module: Any, num_samples: int) -> dict[str, torch.Tensor]:
    """Draw the latents outside the data plates from the model.

    Args:
        module: A ``PyroSVIModule`` that has trained; its parameters are taken as they are.
        num_samples: S.

    Returns:
        ``(S, *shape of the site)`` by site.
    """
    plates = {*module._cut_plates, *module._row_plates()}
    # Closed as this function is left, since it lends the parameters.
    with closing(runs_without_data(module, module.model, num_samples)) as runs:
        drawn = [
            {
                site["name"]: site["value"]
                for site in sites
                if not (is_observation(site) or is_statement_of_value(site))
                and not stands_in(site, plates)
            }
            for sites in runs
        ]
    # Sites that are not in every run, as behind an `if` of a draw, have no array.
    always = set(drawn[0]).intersection(*drawn)
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0] if name in always}


def named_dims(
    groups: Groups,
    plate: str,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    local: Iterable[str] = (),
) -> dict[str, list[str]]:
    """Name the dimension of rows after their plate where the user has given no names.

    Args:
        groups: Arrays by group and variable.
        plate: Name of the plate over rows.
        dims: The user's names of dimensions, by variable.
        coords: The user's labels along a dimension.
        local: Names of latents of rows.

    Returns:
        Names of dimensions by variable.

    Raises:
        ValueError: For names of variables or dimensions that are not there, more names than
            dimensions, and another number of labels than entries.

    Example:
        >>> named_dims({"observed_data": {"y": np.zeros(3)}}, "data", {}, {"data": ["a", "b", "c"]})
        {'y': ['data']}
    """
    own = {name: [each] if isinstance(each, str) else list(each) for name, each in dims.items()}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    of_rows = set(local)
    for group, variables in groups.items():
        for name, array in variables.items():
            shapes.setdefault(name, []).append(array.shape[0 if group in _OF_DATA else 2 :])
            if group not in ("posterior", "prior"):
                of_rows.add(name)
    unknown = sorted(set(own).difference(shapes))
    if unknown:
        raise ValueError(
            f"dims names {', '.join(map(repr, unknown))}, but the variables are "
            f"{', '.join(map(repr, shapes))}"
        )
    named = {**{name: [plate] for name in shapes if name in of_rows}, **own}
    for name, names in named.items():
        # The log-likelihood of a site lacks the dimensions of its event.
        shape = max(shapes[name], key=len)
        if len(names) > len(shape):
            raise ValueError(
                f"dims gives '{name}' the dimensions {names}, but a draw of it has the shape "
                f"{shape}"
            )
        for dim, size in zip(names, shape, strict=False):
            if dim in coords and len(coords[dim]) != size:
                raise ValueError(
                    f"coords has {len(coords[dim])} labels of '{dim}', but '{name}' has {size} "
                    "entries along it"
                )
    unused = sorted(set(coords).difference(dim for names in named.values() for dim in names))
    if unused:
        raise ValueError(
            f"coords labels {', '.join(map(repr, unused))}, which no variable has: name dimensions "
            f"by dims; that of rows is '{plate}' where dims says nothing else"
        )
    return named
