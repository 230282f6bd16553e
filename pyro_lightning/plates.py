"""What users say of data plates."""

from collections.abc import Mapping, Sequence


def read_names(names: str | Sequence[str] | None, argument: str) -> tuple[str, ...]:
    """Read a name or names.

    Raises:
        TypeError: For something else.

    Example:
        >>> read_names("y", "scale_sites")
        ('y',)
    """
    found = (names,) if isinstance(names, str) else tuple(names or ())
    if not all(isinstance(name, str) and name for name in found):
        raise TypeError(f"{argument} must be a name or names, got {names!r}")
    return found


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
    for name, size in data_plate.items():
        if size is None and name not in columns:
            continue
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(
                f"data_plate must state the size of '{name}' as an integer, got {size!r}"
            )
        if size < 1:
            raise ValueError(f"data_plate states {size} for '{name}': expected at least 1")
    return dict(data_plate), columns
