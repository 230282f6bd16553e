"""Arrays that are given by the path of their file."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np


def opened(arrays: Any) -> Any:
    """Put an array in the place of each path; all else is returned as it is.

    A ``.npy`` file becomes a memmap, of which batches read their rows alone. A ``.npz`` file, which
    cannot be mapped, becomes a dict of its arrays in memory.

    Args:
        arrays: An array or path, or a tuple, list or mapping of arrays and ``.npy`` paths.

    Raises:
        ValueError: For a file of another kind, and a ``.npz`` file among other arrays.
        FileNotFoundError: For a file that does not exist.

    Example:
        >>> opened((np.zeros(2), np.ones(2)))
        (array([0., 0.]), array([1., 1.]))
    """
    if isinstance(arrays, Mapping):
        return {name: _array(each) for name, each in arrays.items()}
    if isinstance(arrays, list | tuple):
        return tuple(_array(each) for each in arrays)
    if _is_path(arrays) and str(arrays).endswith(".npz"):
        with np.load(arrays) as file:
            return dict(file)
    return _array(arrays)


def _is_path(given: Any) -> bool:
    return isinstance(given, str | PathLike)


def _array(given: Any) -> Any:
    if not _is_path(given):
        return given
    if not str(given).endswith(".npy"):
        raise ValueError(
            f"arrays are read from .npy files, and from one .npz file that holds all of them; got "
            f"{str(given)!r}"
        )
    return np.load(given, mmap_mode="r")
