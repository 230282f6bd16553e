"""Which latents a guide had, as a checkpoint remembers them, and whether they are the same."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from pyro_lightning.params import shown_name
from pyro_lightning.posterior import is_latent

ROWS = -1  # in a shape: as many as the rows of a batch


def latent_shapes(guide_sites: Iterable[Any], plates: Collection[str]) -> dict[str, list[int]]:
    """List the latents of one run of a guide with their shapes, in the order in which they ran.

    Latents in a sequential data plate, of which there are as many as rows, are left out.

    Args:
        guide_sites: Messages of the sites.
        plates: Names of the plates of which a batch holds a part; their dimensions are ``ROWS``.
    """
    found = {}
    for site in guide_sites:
        frames = [frame for frame in site["cond_indep_stack"] if frame.name in plates]
        if not is_latent(site) or any(frame.dim is None for frame in frames):
            continue
        shape = list(getattr(site["value"], "shape", ()))
        for frame in frames:
            at = len(shape) - getattr(site["fn"], "event_dim", 0) + frame.dim
            if at >= 0:
                shape[at] = ROWS
        found[site["name"]] = shape
    return found


def refuse_other_draws(
    draws: Mapping[str, torch.Tensor], sites: Mapping[str, Sequence[int]], rows: int
) -> None:
    """Refuse draws on a batch that are laid out otherwise than those of the first batch.

    Args:
        draws: Draws by site, in dimension 0.
        sites: Shape of each latent on the first batch, as of :func:`latent_shapes`.
        rows: B, the rows of the batch.

    Raises:
        ValueError: Naming a site, and both shapes.
    """
    for site, draw in draws.items():
        known, shape = sites.get(site), list(draw.shape[1:])
        if known is None:
            continue
        expected = [rows if size == ROWS else size for size in known]
        if len(shape) != len(expected) or any(
            size == ROWS and there != rows for size, there in zip(known, shape, strict=True)
        ):
            raise ValueError(
                f"site '{site}' has shape {tuple(shape)} on this batch of B = {rows} rows, and "
                f"would have {tuple(expected)} on one like those that trained: let the batch have "
                "elements of the same numbers of dimensions."
            )


def other_sites(
    stored: Mapping[str, Sequence[int]], here: Mapping[str, Sequence[int]], ordered: bool
) -> list[str]:
    """Say how the latents of a checkpoint differ from those of a module, a line for each way.

    Args:
        stored: Shape of each latent of the checkpoint, by name.
        here: Shape of each latent of the module.
        ordered: Whether a guide keeps its latents in one vector, in the order in which they run.

    Example:
        >>> other_sites({"mu": []}, {"mu": [3], "tau": []}, False)
        ['missing latent sites: tau ()', 'latent sites of another shape: mu () there, (3,) here']
    """
    missing = [f"{name} {_shape(here[name])}" for name in here if name not in stored]
    unexpected = [f"{name} {_shape(stored[name])}" for name in stored if name not in here]
    differing = [
        f"{name} {_shape(stored[name])} there, {_shape(here[name])} here"
        for name in here
        if name in stored and list(stored[name]) != list(here[name])
    ]
    lines = _lines(
        {
            "missing latent sites": missing,
            "unexpected latent sites": unexpected,
            "latent sites of another shape": differing,
        }
    )
    if not lines and ordered and list(stored) != list(here):
        order = f"{', '.join(stored)} there, {', '.join(here)} here"
        lines = [f"latent sites in another order, which is that of one vector of all: {order}"]
    return lines


def other_parameters(stored: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say how a ``state_dict`` differs from a module's own, a line for each way.

    Example:
        >>> other_parameters({"guide.loc": torch.zeros(2)}, {"guide.loc": torch.zeros(3)})
        ['parameters of another shape: guide.loc (2,) there, (3,) here']
    """
    shapes = [
        f"{parameter_name(key)} {_shape(stored[key].shape)} there, {_shape(value.shape)} here"
        for key, value in here.items()
        if isinstance(value, torch.Tensor) and isinstance(stored.get(key), torch.Tensor)
        if not (is_lazy(value) or is_lazy(stored[key])) and stored[key].shape != value.shape
    ]
    missing, unexpected = here.keys() - stored.keys(), stored.keys() - here.keys()
    lines = lines_of_keys(sorted(missing), sorted(unexpected))
    return [*lines, *_lines({"parameters of another shape": shapes})]


def lines_of_keys(missing: Iterable[str], unexpected: Iterable[str]) -> list[str]:
    """Say which parameters and buffers a checkpoint lacks, and which it has too many.

    Example:
        >>> lines_of_keys(["guide.locs.mu"], ["_pyro_param_store.loc"])
        ['missing parameters: guide.locs.mu', 'unexpected parameters: loc']
    """
    return _lines(
        {
            "missing parameters": [parameter_name(key) for key in missing],
            "unexpected parameters": [parameter_name(key) for key in unexpected],
        }
    )


def parameter_name(key: str) -> str:
    """Return the name by which a user knows an entry of a ``state_dict``."""
    return shown_name(key).removeprefix("_networks.")


def _lines(groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]


def _shape(shape: Sequence[int]) -> str:
    named = ["rows" if size == ROWS else str(size) for size in shape]
    return f"({', '.join(named)}{',' if len(named) == 1 else ''})"
