"""How a batch is laid out, and how that differs from the batch before."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pyro_lightning.batches import named_tensors
from pyro_lightning.retold import is_foreign, retell
from pyro_lightning.rows import data_of

_MAPPING, _SEQUENCE = "mapping", "sequence"


def layout_of(batch: Any) -> Any:
    """Describe the containers of a batch, its keys, and the type and dimensions of its tensors.

    What may change from batch to batch is left out: sizes, since the last batch is smaller and
    sequences are as long as the longest of them, and the values of numbers and strings.

    Returns:
        Something to compare by ``==``.

    Example:
        >>> layout_of({"x": torch.zeros(3, 2)}) == layout_of({"x": torch.zeros(1, 9)})
        True
        >>> layout_of({"x": torch.zeros(3, 2)}) == layout_of({"x": torch.zeros(3)})
        False
    """
    return _layout(data_of(batch))


def _layout(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim()
    if isinstance(value, Mapping):
        return _MAPPING, {key: _layout(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_layout(item) for item in value]
        of_rows = len(set(map(type, value))) == 1 and isinstance(items[0], type)
        return _SEQUENCE, items[:1] if of_rows else items  # such as a string of each row
    return type(value)


def differences(now: Any, before: Any, path: str = "batch") -> Iterator[str]:
    """Say how a layout differs from an earlier one.

    Example:
        >>> layouts = (layout_of((torch.zeros(2, 1), torch.zeros(2, dtype=kind)))
        ...            for kind in (torch.float64, torch.float32))
        >>> list(differences(*layouts))
        ['batch[1] is float64, and was float32']
    """
    kind, was = _kind(now), _kind(before)
    if kind != was:
        yield f"{path} is {_named(now)}, and was {_named(before)}"
    elif kind == _MAPPING:
        mine, its = now[1], before[1]
        for key in its:
            if key not in mine:
                yield f"{path}[{key!r}] is missing"
        for key in mine:
            if key not in its:
                yield f"{path}[{key!r}] is new"
            else:
                yield from differences(mine[key], its[key], f"{path}[{key!r}]")
    elif kind == _SEQUENCE:
        if len(now[1]) != len(before[1]):
            yield f"{path} has {len(now[1])} elements, and had {len(before[1])}"
            return
        for number, pair in enumerate(zip(now[1], before[1], strict=True)):
            yield from differences(*pair, f"{path}[{number}]")
    elif now != before:
        if now[0] != before[0]:
            yield f"{path} is {_dtype(now[0])}, and was {_dtype(before[0])}"
        if now[1] != before[1]:
            yield f"{path} has {now[1]} dimensions, and had {before[1]}"


def of_same_fields(now: Any, before: Any) -> bool:
    """Whether the fields that two layouts share are laid out alike.

    A mapping may leave fields out, which are keywords that have a default: some rows have labels.

    Example:
        >>> labelled = {"x": torch.zeros(2), "y": torch.zeros(2)}
        >>> of_same_fields(layout_of({"x": torch.ones(5)}), layout_of(labelled))
        True
    """
    kind = _kind(now)
    if kind != _kind(before):
        return False
    if kind == _MAPPING:
        return all(of_same_fields(now[1][key], before[1][key]) for key in now[1].keys() & before[1])
    if kind == _SEQUENCE:
        same = len(now[1]) == len(before[1])
        return same and all(map(of_same_fields, now[1], before[1]))
    return bool(now == before)


def _kind(layout: Any) -> Any:
    if not isinstance(layout, tuple):
        return layout
    return torch.Tensor if isinstance(layout[0], torch.dtype) else layout[0]


def _named(layout: Any) -> str:
    kind = _kind(layout)
    if kind == _SEQUENCE:
        return f"a sequence of {len(layout[1])} elements"
    if kind == _MAPPING:
        return f"a mapping with {', '.join(map(repr, layout[1]))}"
    if kind is torch.Tensor:
        return f"a tensor of {_dtype(layout[0])}"
    return "None" if kind is type(None) else f"a {kind.__name__}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def trailing_shapes(batch: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a batch without its rows, by the path to it.

    Example:
        >>> trailing_shapes([torch.zeros(5), torch.zeros(5, 3)])
        {'batch[0]': (), 'batch[1]': (3,)}
    """
    named = named_tensors(data_of(batch), "batch")
    return {path: tuple(tensor.shape[1:]) for path, tensor in named}


def contents_of(batch: Any, most: int = 8) -> str:
    """Say what a batch holds, for the message of an error.

    Example:
        >>> contents_of({"x": torch.zeros(3, 2), "name": "unit"})
        "batch['x'] (float32, shape (3, 2)), batch['name'] (str)"
    """
    found = list(_contents(data_of(batch), "batch"))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return (", ".join(found[:most]) or "nothing") + more


def _contents(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, torch.Tensor):
        yield f"{path} ({_dtype(value.dtype)}, shape {tuple(value.shape)})"
    elif isinstance(value, Mapping | tuple | list) and not value:
        yield f"{path} (empty {type(value).__name__})"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _contents(item, f"{path}[{key!r}]")
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _contents(item, f"{path}[{number}]")
    else:
        yield f"{path} ({type(value).__name__})"


@contextmanager
def telling_contents(
    batch: Any, part: str = "model or guide", hint: Callable[[], str] = str
) -> Iterator[None]:
    """Add what a batch holds to errors of what runs on it, and a hint, which is asked for then."""
    try:
        yield
    except Exception as error:
        if not is_foreign(error):
            raise
        holds = f" The batch holds {contents_of(batch)}.{hint()}"
        retell(error, f"{part} fails on this batch", holds)


def shapes_of(batch: Any, rows: int) -> tuple[Any, ...]:
    """Describe how the tensors of a batch broadcast over its rows.

    Whether there is one row alone, and of each tensor the number of dimensions, or which are of
    size 1 where there are more than one; with the names of fields.

    Example:
        >>> shapes_of([torch.zeros(5), torch.zeros(5, 1, 3)], 5)
        (False, 1, (True, False))
    """
    found: list[Any] = [rows == 1]
    _add_shapes(data_of(batch), found)
    return tuple(found)


def _add_shapes(value: Any, found: list[Any]) -> None:
    if isinstance(value, torch.Tensor):
        dims = value.dim()
        found.append(dims if dims < 2 else tuple([size == 1 for size in value.shape[1:]]))
    elif isinstance(value, Mapping):
        for name, item in value.items():
            found.append(name)
            _add_shapes(item, found)
    elif isinstance(value, tuple | list):
        for item in value:
            _add_shapes(item, found)
