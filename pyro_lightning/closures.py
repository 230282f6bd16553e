"""Networks that functions use without owning them: how they are found."""

import dis
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ProxyTypes

import torch
from pyro.poutine.messenger import Messenger
from torch import nn

# What these packages hold of a user's stands in closures and handlers, not in their own globals.
_LIBRARIES = {"builtins", "torch", "torchmetrics", "pyro", "lightning", "pyro_lightning", "numpy"}
_PLAIN = (str, bytes, int, float, complex, type(None), torch.Tensor)
LONGEST = 1000  # a longer list or dict holds data, not networks
_OWNED = {"_parameters", "_buffers", "_modules"}


def reached_networks(roots: Iterable[Any]) -> dict[str, nn.Module]:
    """Find the ``nn.Module`` objects that functions can reach, by their names there.

    Looked through are globals, closures, defaults, ``functools.partial`` arguments, attributes,
    lists and dicts, bound methods, helper functions and Pyro's handlers, nearest first, and in the
    same order each time. Submodules of what is found are left out unless something else reaches
    them too.

    Args:
        roots: Functions, or other objects.

    Returns:
        Each module once, under the name of the variable, argument or attribute that holds it.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> reached_networks([lambda x, net=net: net(x)])
        {'net': Linear(in_features=1, out_features=1, bias=True)}
    """
    found: dict[str, nn.Module] = {}
    pending = deque(("", root) for root in roots)
    seen: dict[int, Any] = {}  # the objects themselves too, so that no id is used twice
    while pending:
        name, value = pending.popleft()
        # By its type, since a weak reference to what is gone cannot even be asked for its class.
        if type(value) in ProxyTypes or isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found[_free(name or type(value).__name__.lower(), found)] = value
        pending.extend(_inside(name, value))
    return found


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """Return a name that a submodule may have, as close to the given one as can be."""
    name = free = name.replace(".", "_")
    number = 1
    while free in taken or hasattr(nn.Module, free):
        number += 1
        free = f"{name}_{number}"
    return free


def _inside(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """List what an object leads to; what has no name of its own is named after the object."""
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, MethodType):
        return [(name, value.__self__), (name, value.__func__)]
    if isinstance(value, partial):
        arguments = zip(_positional(value.func, len(value.args)), value.args, strict=True)
        return [(name, value.func), *arguments, *value.keywords.items()]
    if isinstance(value, staticmethod | classmethod):
        return [(name, value.__func__)]
    if isinstance(value, property | cached_property):
        return [(name, value.fget if isinstance(value, property) else value.func)]
    if isinstance(value, dict | list | tuple | set | frozenset):
        if len(value) > LONGEST:
            return []
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [(f"{name}_{key}" if name else str(key), item) for key, item in items]
    if isinstance(value, type):
        return [] if is_of_library(value) else list(vars(value).items())
    if isinstance(value, nn.Module):
        return [held for part in value.modules() for held in _held(name, part)]
    if isinstance(value, Messenger) or not is_of_library(type(value)):
        return _held(name, value)
    return []


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    scopes = {
        "LOAD_DEREF": {name: cell.cell_contents for name, cell in bound_cells(function)},
        "LOAD_GLOBAL": {} if is_of_library(function) else function.__globals__,
    }
    for operation, names in loads(code):
        name, value = names[0], scopes[operation].get(names[0])
        for attribute in names[1:]:
            if isinstance(value, ModuleType):
                name, value = attribute, vars(value).get(attribute)
        yield name, value
    arguments = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    yield from vars(function).items()


def loads(code: CodeType) -> Iterator[tuple[str, list[str]]]:
    """List the variables that a function loads from outside, each with the attributes taken of it.

    The functions inside of it are included. The names alone, without the instructions, would not
    tell an attribute from a global of the same name.
    """
    found: list[tuple[str, list[str]]] = []
    follows = False
    for instruction in dis.get_instructions(code):
        operation = instruction.opname
        if operation in ("LOAD_GLOBAL", "LOAD_DEREF"):
            found.append((operation, [instruction.argval]))
            follows = True
        elif operation in ("LOAD_ATTR", "LOAD_METHOD") and follows:
            found[-1][1].append(instruction.argval)
        elif operation != "EXTENDED_ARG":
            follows = False
    yield from found
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from loads(constant)


def bound_cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """List the variables that a function closes over, with their cells."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if _is_bound(cell):
            yield name, cell


def _is_bound(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a variable that the enclosing function has not set yet
        return False
    return True


def _held(name: str, value: Any) -> list[tuple[str, Any]]:
    """List an object's attributes, and its classes, whose methods may use networks as well."""
    attributes = getattr(value, "__dict__", {}).items()
    joined = [(f"{name}_{k}" if name else k, item) for k, item in attributes if k not in _OWNED]
    return [*joined, *(("", base) for base in type(value).__mro__)]


def _positional(function: Any, count: int) -> Iterable[str]:
    skipped = isinstance(function, MethodType)
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType) and code.co_argcount - skipped >= count:
        return code.co_varnames[skipped : skipped + count]
    return [f"argument_{number}" for number in range(count)]


def is_of_library(value: Any) -> bool:
    module = value.__module__
    # Cython's type of functions has a descriptor there, which serves the functions themselves.
    return isinstance(module, str) and is_library(module)


def is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES
