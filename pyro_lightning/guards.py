"""Python state that a trace of model and guide took for constant, and whether it still is."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from pyro_lightning._upstream import hook_tables
from pyro_lightning.closures import LONGEST
from pyro_lightning.places import SCALARS, places


class Guard(NamedTuple):
    """A place that held a value.

    Attributes:
        name: How the model reaches it.
        read: Returns what the place of a key holds.
        key: The key.
        value: What it held.
        moves: Whether it is to stay the same while a trace is made only.
    """

    name: str
    read: Callable[[Any], Any]
    key: Any
    value: Any
    moves: bool = False


def changed(guards: Collection[Guard]) -> str | None:
    """Name the first place that holds something else than it did, or None.

    Example:
        >>> settings = {"beta": 1.0}
        >>> guards = find_guards([settings])
        >>> settings["beta"] = 2.0
        >>> changed(guards)
        'beta'
    """
    for name, read, key, value, _ in guards:
        now = read(key)
        if now is not value and not _equal(now, value):
            return name
    return None


def _equal(now: Any, value: Any) -> bool:
    # Equal numbers of another kind give another trace: 1 and True, 1 and 1.0.
    return isinstance(value, SCALARS) and type(now) is type(value) and bool(now == value)


def renewed(guards: Iterable[Guard]) -> list[Guard]:
    """Read places anew."""
    return [guard._replace(value=guard.read(guard.key)) for guard in guards]


def find_guards(
    roots: Iterable[Any], hidden: Callable[[Any, str], bool] = lambda holder, name: False
) -> list[Guard]:
    """List the Python state that functions and modules can reach, with its values.

    Attributes, globals, closures, defaults, dicts, sets, short lists and small arrays are looked
    through. Tensors and large arrays are watched for being replaced; the contents of tensors are
    inputs of a trace. What a library keeps in its own objects is left out, but for the public
    attributes of ELBOs, distributions and handlers.

    Args:
        roots: Functions, modules, other objects.
        hidden: Tells, for an object and the name of its attribute, what is no state of the user's.
    """
    found: list[Guard] = []
    pending = deque(("", root) for root in roots)
    seen: dict[int, Any] = {}  # the objects themselves too, so that no id is used twice
    known: set[Any] = set()
    hooks: list[Mapping[int, Any]] = []
    while pending:
        name, value = pending.popleft()
        if isinstance(value, (*SCALARS, torch.Tensor)) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            hooks += hook_tables(value)
        for inner, read, key, held, moves in places(name, value, hidden):
            if read is not None:
                where = _where(read, key)
                if where not in known:
                    known.add(where)
                    found.append(Guard(inner, read, key, held, moves))
            if not moves:
                pending.append((inner, held))
    if hooks:  # of all modules in one sum: there are many
        found.append(Guard("hooks of modules", partial(_total, hooks), None, _total(hooks, None)))
    return found


def _where(read: Any, key: Any) -> Any:
    if isinstance(read, partial):
        return read.func, id(read.args[0]), key
    return id(getattr(read, "__self__", read)), key


def _total(tables: list[Mapping[int, Any]], _: None) -> int:
    return sum(map(len, tables))


def guards_of_values(tensors: Iterable[torch.Tensor]) -> list[Guard]:
    """Watch the contents of tensors; of large ones, and on a GPU, that nothing is written there."""
    found = []
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        small = tensor.device.type == "cpu" and tensor.numel() <= LONGEST
        read = partial(_values if small else _version, tensor)
        name = "the value of a tensor that is read into Python"
        found.append(Guard(name, read, None, read(None)))
    return found


def _values(tensor: torch.Tensor, _: None) -> str:
    return str(tensor.tolist())


def _version(tensor: torch.Tensor, _: None) -> int:
    return -1 if tensor.is_inference() else tensor._version
