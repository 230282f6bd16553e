"""The format of what a checkpoint holds beside weights: plain containers, with a version."""

import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

KEY, VERSION = "pyro_lightning", 2

# What each version has; a key that a checkpoint lacks has this value.
_ABSENT: dict[str, Any] = {
    "dataset_size": None,
    "unusable": 0.0,
    "plates": None,
    "columns": {},
    "identities": None,
    "trained": None,
    "steps_per_batch": None,
    "example": None,
    "shown_rows": None,
    "built_rows": None,
    "no_example": "it was written by an earlier version of pyro_lightning",
    "structure": None,
}
_NUMBERS = (bool, int, float, complex)
_PLAIN = (*_NUMBERS, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def stored_in(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read what a ``PyroSVIModule`` stored in a checkpoint, in the format of this version.

    Args:
        checkpoint: What ``torch.load`` returned.

    Returns:
        The entries by name; None where there are none.

    Raises:
        ValueError: For a format that is newer than this version of the library knows, or none.

    Example:
        >>> stored_in({"pyro_lightning_steps_per_batch": 4})["steps_per_batch"]
        4
        >>> stored_in({"pyro_lightning": {"version": 99}})
        Traceback (most recent call last):
        ValueError: the checkpoint has format 99 of pyro_lightning, ...
    """
    first = ("pyro_lightning_rows", "pyro_lightning_steps_per_batch")
    stored = checkpoint.get(KEY)
    if stored is None:
        if not any(name in checkpoint for name in first):
            return None
        # Version 1 had two keys of the checkpoint, and no number.
        stored = {"version": 1, **{name: checkpoint.get(name) for name in first}}
    version = stored.get("version") if isinstance(stored, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(
            f"checkpoint['{KEY}'] is not what pyro_lightning writes there: expected a dict with a "
            f"version, got {type(stored).__name__} with version {version!r}"
        )
    if version > VERSION:
        raise ValueError(
            f"the checkpoint has format {version} of pyro_lightning, and this release reads up to "
            f"{VERSION}: a newer one wrote it. Upgrade pyro_lightning."
        )
    for number in range(version, VERSION):
        stored = _MIGRATIONS[number](stored)
    return {**_ABSENT, **stored}


def _from_1(stored: dict[str, Any]) -> dict[str, Any]:
    rows = stored["pyro_lightning_rows"] or {}
    return {"version": 2, "steps_per_batch": stored["pyro_lightning_steps_per_batch"], **rows}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def pack(value: Any, path: str = "batch") -> Any:
    """Turn a batch into containers, tensors and numbers that ``weights_only`` reads back.

    Tensors are copied to the CPU, so that none brings the storage along that it is a view of.

    Args:
        value: Tensors, numbers, strings, None and arrays, in tuples, named tuples, lists and
            mappings.
        path: The expression that reaches it, for an error.

    Raises:
        TypeError: For anything else, naming it and where it is.

    Example:
        >>> unpack(pack((torch.zeros(2), {"name": "unit"})))
        (tensor([0., 0.]), {'name': 'unit'})
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (torch.Tensor, nn.Parameter):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc":
        return {"kind": "array", "items": torch.tensor(np.asarray(value))}
    if isinstance(value, Mapping):
        items = [
            (pack(key, f"{path}, key {key!r}"), pack(item, f"{path}[{key!r}]"))
            for key, item in value.items()
        ]
        return {"kind": "dict", "items": items}
    if kind in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        packed = [pack(item, f"{path}[{number}]") for number, item in enumerate(value)]
        if kind in (list, tuple):
            return {"kind": kind.__name__, "items": packed}
        where = {"module": kind.__module__, "name": kind.__qualname__, "fields": value._fields}
        return {"kind": "named tuple", "items": packed, **where}
    raise TypeError(f"{path} is a {kind.__name__}")


def unpack(packed: Any) -> Any:
    """Undo :func:`pack`; a mapping comes back as a dict.

    A named tuple is of its own class where the module that defines it has been imported, and of
    one of the same fields otherwise: nothing is imported because a file says so.
    """
    if not isinstance(packed, dict):
        return packed
    kind, items = packed["kind"], packed["items"]
    if kind == "array":
        return items.numpy()[()]
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in items}
    values = [unpack(item) for item in items]
    if kind == "named tuple":
        return _named(packed["module"], packed["name"], tuple(packed["fields"]), values)
    return tuple(values) if kind == "tuple" else values


def blank(packed: Any) -> Any:
    """Put the same value in the place of every number, and nothing in that of strings.

    Shapes, dtypes and the names of fields are left of a packed batch. Integers in tensors become 0,
    since they may be indices, everything else 1, since it may be a scale or a size.

    Example:
        >>> blank(pack((torch.tensor([3, 4]), torch.tensor([0.5]), "unit")))["items"]
        [tensor([0, 0]), tensor([1.]), '']
    """
    if isinstance(packed, torch.Tensor):
        shape, dtype = packed.shape, packed.dtype
        real = dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
        return torch.ones(shape, dtype=dtype) if real else torch.zeros(shape, dtype=dtype)
    if isinstance(packed, str | bytes):
        return type(packed)()
    if isinstance(packed, _NUMBERS):
        return type(packed)(1)
    if not isinstance(packed, dict):
        return packed
    items = packed["items"]
    if packed["kind"] == "dict":
        return {**packed, "items": [(key, blank(item)) for key, item in items]}
    if packed["kind"] == "array":
        return {**packed, "items": blank(items)}
    return {**packed, "items": [blank(item) for item in items]}


def _named(module: str, name: str, fields: tuple[str, ...], values: list[Any]) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):  # not by getattr, which may run code of the module
        found = getattr(found, "__dict__", {}).get(part)
    if isinstance(found, type) and issubclass(found, tuple):
        if getattr(found, "_fields", None) == fields:
            return found._make(values)  # type: ignore[attr-defined]
    return _fields_alone(name.rpartition(".")[-1], fields, values)


def _fields_alone(name: str, fields: tuple[str, ...], values: list[Any]) -> Any:
    """Make a named tuple of a class of its own, which can be copied and pickled all the same."""
    made: Any = namedtuple(name, fields)  # type: ignore[misc]

    def reduced(self: Any) -> Any:
        return _fields_alone, (name, fields, list(self))

    return type(name, (made,), {"__slots__": (), "__reduce__": reduced})(*values)
