"""ArviZ of either generation: 0.x with its ``InferenceData``, 1.x with xarray's ``DataTree``."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

Variables = Mapping[str, Any]

CONTAINERS = ("auto", "InferenceData", "DataTree")
_SAMPLES = ("chain", "draw")


def psislw(log_weights: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], float]:
    """Smooth the largest of S importance weights by ArviZ, and fit the shape of their tail.

    Args:
        log_weights: Of S independent draws, ``(S,)``; not all equal.

    Returns:
        The smoothed logarithms, normalised so that the weights sum to 1; and Pareto k-hat.

    Raises:
        ImportError: Where ArviZ is not installed, naming the extra.
    """
    base = _found("arviz_stats.base")
    if base is not None:  # takes log-likelihoods, of which the weights are the inverse
        smoothed, shape = base.array_stats.psislw(-log_weights)
    else:
        # Its weights of candidates are 1 / sum exp(...), which is 0 where that overflows.
        with np.errstate(over="ignore"):
            smoothed, shape = _needed("arviz").psislw(log_weights)
    return np.asarray(smoothed), float(shape)


def make_container(
    groups: Mapping[str, Variables],
    *,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
    container: str = "auto",
) -> Any:
    """Put groups of arrays into ArviZ's container.

    Args:
        groups: Arrays by group and variable; with dimensions of chain and draw first, but in
            groups of data.
        dims: Names of the other dimensions of a variable.
        coords: Labels along a dimension.
        container: ``"InferenceData"`` of ArviZ 0.x; ``"DataTree"`` of 1.x; or ``"auto"`` for that
            of the ``arviz`` that is installed, or else of ``arviz_base``.

    Raises:
        ImportError: Where what is asked for is not installed.
    """
    arviz = _found("arviz") if container != "DataTree" else None
    if arviz is not None and int(arviz.__version__.split(".")[0]) < 1:
        return arviz.from_dict(**groups, dims=dict(dims), coords=dict(coords))
    if container == "InferenceData":
        raise ImportError(
            "container='InferenceData' needs ArviZ before 1.0: pip install 'arviz<1'. ArviZ 1.x "
            "has a DataTree in its place"
        )
    base = _found("arviz_base")
    if base is None and container == "DataTree":
        raise ImportError(
            "container='DataTree' needs ArviZ 1.x, of which arviz-base is enough: pip install "
            "arviz-base"
        )
    if base is None:
        base = _needed("arviz")
    return base.from_dict(
        dict(groups), dims=dict(dims), coords=dict(coords), sample_dims=list(_SAMPLES)
    )


def _found(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (name, name.split(".")[0]):
            raise
        return None


def _needed(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'this needs {name}: pip install "pyro-lightning[arviz]"') from error
