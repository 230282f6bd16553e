"""What code reads of an object by name."""

import dis
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import takewhile
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from pyro_lightning.places import SCALARS, codes, of_others, places

_LOOKS_UP = {"getattr", "hasattr"}
_COMPUTES = {"vars", "__dict__", "__getattribute__", "attrgetter"}


class Names(NamedTuple):
    """The names that code reads.

    Attributes:
        read: Those that stand in it.
        looked_up: Those that are looked up, as by ``getattr(owner, "name")``.
        computed: Whether code looks attributes up by names that it computes.
    """

    read: frozenset[str]
    looked_up: frozenset[str]
    computed: bool

    def has(self, name: str) -> bool:
        """Whether code may read a name, as far as that is known."""
        return name in self.read or name in self.looked_up


def names_read(owner: Any, roots: Iterable[Any]) -> Names:
    """Name what functions may read of an object, by themselves and by all the code they reach.

    Of the object's own methods those are followed that are named; other objects and modules are
    followed as a whole.

    Example:
        >>> sorted(names_read(object(), [lambda counter: counter.steps + counter.start]).read)
        ['start', 'steps']
    """
    given = list(roots)
    pending = deque(given)
    read: set[str] = set()
    looked_up: set[str] = set()
    computed = False
    seen: dict[int, Any] = {}  # the objects themselves too, so that no id is used twice
    while pending:
        value = pending.popleft()
        known = isinstance(value, (*SCALARS, torch.Tensor)) or id(value) in seen
        if known or value is owner or value is type(owner):
            continue
        seen[id(value)] = value
        asked = any(value is root for root in given)
        if isinstance(value, FunctionType) and (asked or not of_others(value)):
            before = read | looked_up
            for code in codes(value.__code__):
                read.update(code.co_names)
                found = list(_looked_up(code))
                computed = computed or None in found
                looked_up.update(name for name in found if name is not None)
            for name in (read | looked_up) - before:
                pending.extend(_held(owner, name))
        pending.extend(place.held for place in places("", value))
    return Names(frozenset(read), frozenset(looked_up), computed)


def _looked_up(code: CodeType) -> Iterator[str | None]:
    """Yield the names that code looks attributes up by; None for one that it computes."""
    if _COMPUTES.intersection(code.co_names):
        yield None
    if not _LOOKS_UP.intersection(code.co_names):
        return
    instructions = list(dis.get_instructions(code))
    for number, each in enumerate(instructions):
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME") and each.argval in _LOOKS_UP:
            # The arguments, which are loaded one after the other where nothing is computed.
            loaded = takewhile(_loads, (after for after in instructions[number + 1 :]))
            names = [a.argval for a in loaded if a.opname == "LOAD_CONST"]
            yield next((name for name in names if isinstance(name, str)), None)


def _loads(instruction: dis.Instruction) -> bool:
    return instruction.opname.startswith(("LOAD_", "PUSH_NULL", "CACHE", "EXTENDED_ARG"))


def _held(owner: Any, name: str) -> Iterator[Any]:
    """Yield what an object and the user's classes of it have by a name."""
    yield getattr(owner, "__dict__", {}).get(name)
    if isinstance(owner, nn.Module):
        yield owner._modules.get(name)
    for base in type(owner).__mro__:
        if not of_others(base):
            yield vars(base).get(name)


@cache
def names_of_libraries(cls: type) -> frozenset[str]:
    """Name the attributes that the libraries' code of a class has, or sets of its objects.

    Example:
        >>> {"training", "_epoch"} & names_of_libraries(nn.Linear)
        {'training'}
    """
    found: set[str] = set()
    for base in filter(of_others, cls.__mro__):
        found.update(vars(base), vars(base).get("__annotations__", ()))
        for item in vars(base).values():
            function = item.fget if isinstance(item, property) else item
            function = getattr(function, "__wrapped__", function)
            function = getattr(function, "__func__", function)
            if isinstance(function, FunctionType):
                found.update(_set_of_self(function.__code__))
    return frozenset(found)


def _set_of_self(code: CodeType) -> Iterator[str]:
    owner = None
    for each in dis.get_instructions(code):
        if each.opname == "STORE_ATTR" and owner == "self":
            yield str(each.argval)
        # Python 3.13 and later load two variables by one instruction, whose names are a tuple.
        loaded = each.argval if isinstance(each.argval, tuple) else (each.argval,)
        owner = loaded[-1] if loaded else None


def defined_by_user(owner: Any, name: str) -> bool:
    """Whether a class of the user's defines an attribute of an object."""
    return any(name in vars(base) for base in type(owner).__mro__ if not of_others(base))
