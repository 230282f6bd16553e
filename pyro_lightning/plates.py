"""What users say of data plates."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from pyro_lightning.arguments import read_count, shortly


def read_names(names: str | Sequence[str] | None, argument: str) -> tuple[str, ...]:
    """Read a name or names.

    Raises:
        TypeError: For something else.

    Example:
        >>> read_names("y", "scale_sites")
        ('y',)
    """
    if names is None:
        return ()
    listed = isinstance(names, Iterable) and not isinstance(names, Mapping | torch.Tensor)
    found: tuple[Any, ...] = tuple(names) if listed and not isinstance(names, str) else (names,)
    if not all(isinstance(name, str) and name for name in found):
        raise TypeError(f"{argument} must be a name or names, got {shortly(names)}")
    return tuple(dict.fromkeys(found))


def read_data_plates(
    data_plate: str | Sequence[str] | Mapping[str, int | None] | None,
) -> tuple[dict[str, int | None], tuple[str, ...]]:
    """Read the argument ``data_plate``.

    Returns:
        The size that is stated of each plate, None for N; and the names of the plates that are
        over something else than the rows of a batch, the columns of a table.

    Raises:
        TypeError: For what is no name, or a size that is no integer.
        ValueError: For a size below 1, or a plate of columns without a size.

    Example:
        >>> read_data_plates("data")
        ({'data': None}, ())
        >>> read_data_plates({"users": 50, "items": 7})
        ({'users': 50, 'items': 7}, ('items',))
    """
    names = read_names(
        tuple(data_plate) if isinstance(data_plate, Mapping) else data_plate, "data_plate"
    )
    if not isinstance(data_plate, Mapping):
        return dict.fromkeys(names), ()
    columns = names[1:]
    sizes = {
        name: None
        if size is None and name not in columns
        else read_count(size, f"the size of '{name}' in data_plate")
        for name, size in data_plate.items()
    }
    return sizes, columns
