"""What an object of Python leads to, and how each place is read anew."""

import io
import os
import pickle
import sys
from argparse import Namespace
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cached_property, partial, partialmethod, singledispatchmethod
from random import Random
from threading import local
from types import (
    BuiltinMethodType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import Distribution, Transform

from pyro_lightning._upstream import hook_tables
from pyro_lightning.closures import LONGEST, bound_cells, is_library, loads

SCALARS = (bool, int, float, complex, str, bytes, type(None))
# Packages whose objects a model may hold, and whose insides it does not change.
_OTHERS = {"pandas", "scipy", "sklearn", "matplotlib", "jax", "numpyro", "rich", "torchmetrics"}
_DATA = (*SCALARS, torch.Tensor, np.ndarray, dict, list, tuple, set)
_MISSING = object()
# Objects of these libraries whose public attributes a user may set.
_SETTABLE = (Messenger, Distribution, Transform, ELBO)
_CONTAINERS = (SimpleNamespace, Namespace, UserDict, UserList, ChainMap, local)
_DESCRIPTORS = (property, cached_property, staticmethod, classmethod)
_GENERATORS = (np.random.Generator, np.random.RandomState, Random, torch.Generator)


class Place(NamedTuple):
    """A place that holds something.

    Attributes:
        name: How it is reached.
        read: Returns what the place of a key holds; None where nothing else can come to be there.
        key: The key.
        held: What it holds.
        moves: Whether that changes as it is used, and says nothing from one step to the next.
    """

    name: str
    read: Callable[[Any], Any] | None
    key: Any
    held: Any
    moves: bool = False


def places(
    name: str, value: Any, hidden: Callable[[Any, str], bool] = lambda holder, name: False
) -> Iterator[Place]:
    """List what an object leads to.

    Args:
        name: How the object is reached.
        value: The object.
        hidden: Tells, for an object and the name of its attribute, what is no state of the user's;
            of the name ``__dict__``, whether new attributes are none.

    Example:
        >>> [(place.name, place.held) for place in places("settings", SimpleNamespace(beta=1.0))]
        [('settings.beta', 1.0), ('attributes of settings', 1)]
    """
    if isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, MethodType):
        yield Place(name, None, None, value.__self__)
        yield Place(name, None, None, value.__func__)
    elif isinstance(value, BuiltinMethodType | MethodWrapperType):
        yield Place(name, None, None, value.__self__)
    elif isinstance(value, _GENERATORS):
        yield Place(f"random numbers of {name}", partial(_state, value), None, _state(value), True)
    elif isinstance(value, partial | partialmethod):
        yield Place(name, None, None, value.func)
        yield Place(name, None, None, value.args)
        yield from _of_dict(name, value.keywords)
    elif isinstance(value, _DESCRIPTORS):
        yield Place(name, None, None, _function_of(value))
    elif isinstance(value, singledispatchmethod):
        yield Place(name, None, None, value.func)
        yield Place(name, None, None, value.dispatcher)
    elif isinstance(value, ContextVar):
        yield Place(name, partial(_of_context, value), None, _of_context(value, None))
    elif isinstance(value, dict | list | tuple | MappingProxyType | deque):
        yield from _of_items(name, value)
    elif isinstance(value, set | frozenset | np.ndarray):
        if (value.size if isinstance(value, np.ndarray) else len(value)) <= LONGEST:
            yield Place(name, partial(_contents, value), None, _contents(value, None))
    elif isinstance(value, type):
        if not of_others(value):
            yield from _of_class(name, value, value, hidden)
    elif isinstance(value, nn.Module):
        yield from _of_dict(name, value._modules)
        for table in hook_tables(value):
            yield from (Place("", None, None, hook) for hook in list(table.values()))
        yield from _of_object(name, value, hidden)
    elif isinstance(value, _CONTAINERS):
        yield from _of_object(name, value, hidden)
    elif value is os.environ:
        yield Place("os.environ", _environment, None, _environment(None))
    elif isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        yield Place(f"the iterator {name}", _never_twice, None, None, True)
        yield from _of_object(name, value, hidden)
    elif isinstance(value, _SETTABLE) and of_others(type(value)):
        yield from _of_dict(name, vars(value), lambda key: not key.startswith("_"))
    elif hasattr(value, "__wrapped__") and callable(value):  # such as of functools.lru_cache
        yield Place(name, None, None, value.__wrapped__)
    elif not (isinstance(value, ModuleType) or of_others(type(value))):
        yield from _of_object(name, value, hidden)


# -- how places are read ---------------------------------------------------------------------------


def _item(values: Any, index: int) -> Any:
    return values[index] if index < len(values) else _MISSING


def _length(values: Any, _: None) -> int:
    return len(values)


def _contents(values: Any, _: None) -> Any:
    return values.tobytes() if isinstance(values, np.ndarray) else str(sorted(map(repr, values)))


def _state(generator: Any, _: None = None) -> bytes:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().tolist())
    return pickle.dumps(generator)


def _never_twice(_: None) -> object:
    return object()


def _environment(_: None) -> str:
    return str(list(os.environ.items()))


def _of_context(variable: ContextVar[Any], _: None) -> Any:
    return variable.get(None)


def _attribute(owner: type, key: str) -> Any:
    return vars(owner).get(key, _MISSING)


def _slot(holder: Any, key: str) -> Any:
    return getattr(holder, key, _MISSING)


def _content(cell: Any, _: None) -> Any:
    return cell.cell_contents


# -- of each kind of object ------------------------------------------------------------------------


def _of_items(name: str, value: Any) -> Iterator[Place]:
    if len(value) > LONGEST:
        return
    if isinstance(value, dict | MappingProxyType):
        yield from _of_dict(name, value)
    else:
        read = None if isinstance(value, tuple) else partial(_item, value)
        for number, item in enumerate(value):
            yield Place(f"{name}[{number}]", read, number, item)
    if not isinstance(value, tuple):
        yield Place(f"len({name})", partial(_length, value), None, len(value))


def _of_dict(
    name: str, value: Any, chosen: Callable[[str], bool] = lambda key: True
) -> Iterator[Place]:
    for key, item in list(value.items()):
        if chosen(key):
            yield Place(f"{name}.{key}" if name else str(key), value.get, key, item)


def _of_function(function: FunctionType) -> Iterator[Place]:
    if of_others(function):
        return
    for key, cell in bound_cells(function):
        yield Place(key, partial(_content, cell), None, cell.cell_contents)
    for _, names in loads(function.__code__):
        scope, path = function.__globals__, []
        for name in names:
            held, read = scope.get(name), scope.get
            path.append(name)
            if isinstance(held, ModuleType):
                if held is os:
                    yield Place("os.environ", None, None, os.environ)
                if _is_other(held.__name__):
                    break
                scope = vars(held)
                continue
            if held is os.getenv:
                held = os.environ
            if name in scope:
                yield Place(".".join(path), read, name, scope[name])
                yield Place(".".join(path), None, None, held)
            break
    for module in _imported(function):
        names_used = {name for code in codes(function.__code__) for name in code.co_names}
        read = vars(module).get
        for name in sorted(names_used.intersection(vars(module))):
            yield Place(f"{module.__name__}.{name}", read, name, vars(module)[name])
    yield Place("", None, None, function.__defaults__)
    yield from _of_dict("", function.__kwdefaults__ or {})
    own = vars(function)
    yield from _of_dict("", own)
    yield Place(f"attributes of {function.__name__}", partial(_length, own), None, len(own))


def _imported(function: FunctionType) -> Iterator[ModuleType]:
    """Yield the modules of the user's that a function imports as it runs."""
    package = function.__globals__.get("__package__") or ""
    for code in codes(function.__code__):
        for name in code.co_names:
            for full in (name, f"{package}.{name}"):
                module = sys.modules.get(full)
                if module is not None and not _is_other(full):
                    yield module


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def _function_of(value: Any) -> Any:
    """Return the function of a property, or of a static or class method."""
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, cached_property) else value.__func__


def _of_object(name: str, value: Any, hidden: Callable[[Any, str], bool]) -> Iterator[Place]:
    attributes = getattr(value, "__dict__", {})
    inner = _OF_EVERY_MODULE if isinstance(value, nn.Module) else ()
    private = isinstance(value, nn.Module) and of_others(type(value))
    for key, item in list(attributes.items()):
        if key in inner or hidden(value, key):
            continue
        # What a library's module collects as it runs, such as an autoguide's plates.
        if private and (key.startswith("_") or isinstance(item, dict | list | tuple)):
            continue
        yield Place(f"{name}.{key}" if name else key, attributes.get, key, item)
    yield from _of_class(name, value, type(value), hidden)
    if hasattr(value, "__dict__") and not private and not hidden(value, "__dict__"):
        count = partial(_length, attributes)
        yield Place(f"attributes of {name}", count, None, len(attributes))


def _of_class(
    name: str, value: Any, cls: type, hidden: Callable[[Any, str], bool]
) -> Iterator[Place]:
    """List what the user's classes hold for an object of theirs, or for themselves."""
    attributes = getattr(value, "__dict__", {})
    for base in cls.__mro__:
        if of_others(base):
            continue
        for key, item in list(vars(base).items()):
            own = not key.startswith("__")
            if hidden(value, key) or not (own or isinstance(item, FunctionType)):
                continue
            yield Place(key, partial(_attribute, base), key, item)
            # A default, which an attribute of the object's own may come to hide.
            if value is not cls and isinstance(item, _DATA) and own and key not in attributes:
                yield Place(f"{name}.{key}" if name else key, attributes.get, key, None)
        count = partial(_length, vars(base))
        yield Place(f"attributes of {base.__name__}", count, None, len(vars(base)))
        slots = vars(base).get("__slots__", ())
        if value is not cls:
            for key in (slots,) if isinstance(slots, str) else slots:
                if key.startswith("__") and not key.endswith("__"):
                    key = f"_{base.__name__.lstrip('_')}{key}"
                if key not in ("__dict__", "__weakref__"):
                    yield Place(f"{name}.{key}", partial(_slot, value), key, _slot(value, key))


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def of_others(value: Any) -> bool:
    """Whether a class or function is of a library."""
    return _is_other(value.__module__ or "")


def _is_other(module: str) -> bool:
    top = module.partition(".")[0]
    return top in _OTHERS or is_library(module) or top in sys.stdlib_module_names
