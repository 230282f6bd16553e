"""Python state that a trace of model and guide took for constant, and whether it still is."""

import inspect
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from pyro_lightning.closures import LONGEST, bound_cells, is_library, loads

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
# Packages whose objects a model may hold, and whose insides it does not change.
_OTHERS = {"pandas", "scipy", "sklearn", "matplotlib", "jax", "numpyro", "rich", "torchmetrics"}
_DATA = (*_SCALARS, torch.Tensor, np.ndarray, dict, list, tuple, set)
_MISSING = object()


class Guard(NamedTuple):
    """A place that held a value.

    Attributes:
        name: How the model reaches it.
        read: Returns what the place of a key holds.
        key: The key.
        value: What it held.
    """

    name: str
    read: Callable[[Any], Any]
    key: Any
    value: Any


def changed(guards: Collection[Guard]) -> str | None:
    """Name the first place that holds something else than it did, or None.

    Example:
        >>> settings = {"beta": 1.0}
        >>> guards = find_guards([settings])
        >>> settings["beta"] = 2.0
        >>> changed(guards)
        'beta'
    """
    for name, read, key, value in guards:
        now = read(key)
        if now is not value and not _equal(now, value):
            return name
    return None


def _equal(now: Any, value: Any) -> bool:
    # Equal numbers of another kind give another trace: 1 and True, 1 and 1.0.
    return isinstance(value, _SCALARS) and type(now) is type(value) and bool(now == value)


def find_guards(
    roots: Iterable[Any], hidden: Callable[[Any, str], bool] = lambda holder, name: False
) -> list[Guard]:
    """List the Python state that functions and modules can reach, with its values.

    Attributes, globals, closures, defaults, dicts, sets, short lists and small arrays are looked
    through. Tensors and large arrays are watched for being replaced; the contents of tensors are
    inputs of a trace. What a library keeps in its own objects is left out.

    Args:
        roots: Functions, modules, other objects.
        hidden: Tells, for a module and the name of its attribute, what is no state of the user's.
    """
    found: list[Guard] = []
    pending = deque(("", root) for root in roots)
    seen: dict[int, Any] = {}  # the objects themselves too, so that no id is used twice
    places: set[Any] = set()
    while pending:
        name, value = pending.popleft()
        if isinstance(value, (*_SCALARS, torch.Tensor)) or id(value) in seen:
            continue
        seen[id(value)] = value
        for inner, read, key, held in _places(name, value, hidden):
            where = id(getattr(read, "__self__", read)), key
            if read is not None and where not in places:
                places.add(where)
                found.append(Guard(inner, read, key, held))
            pending.append((inner, held))
    return found


_Place = tuple[str, Callable[[Any], Any] | None, Any, Any]


def _places(name: str, value: Any, hidden: Callable[[Any, str], bool]) -> Iterator[_Place]:
    """List what an object leads to; what cannot be replaced there has no way to be read anew."""
    if isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, MethodType):
        yield name, None, None, value.__self__
        yield name, None, None, value.__func__
    elif isinstance(value, partial):
        yield name, None, None, value.func
        yield name, None, None, value.args
        yield from _of_dict(name, value.keywords)
    elif isinstance(value, dict | list | tuple):
        if len(value) > LONGEST:
            return
        if isinstance(value, dict):
            yield from _of_dict(name, value)
            yield f"len({name})", partial(_length, value), None, len(value)
            return
        read = partial(_item, value) if isinstance(value, list) else None
        for number, item in enumerate(value):
            yield f"{name}[{number}]", read, number, item
        if isinstance(value, list):
            yield f"len({name})", partial(_length, value), None, len(value)
    elif isinstance(value, set | np.ndarray):
        if (len(value) if isinstance(value, set) else value.size) <= LONGEST:
            yield name, partial(_contents, value), None, _contents(value, None)
    elif isinstance(value, nn.Module):
        yield from _of_dict(name, value._modules)
        yield from _of_object(name, value, hidden)
    elif isinstance(value, SimpleNamespace | Namespace) or not (
        isinstance(value, type | ModuleType) or _of_others(type(value))
    ):
        yield from _of_object(name, value, hidden)


def _item(values: list[Any], index: int) -> Any:
    return values[index] if index < len(values) else _MISSING


def _length(values: list[Any] | dict[Any, Any], _: None) -> int:
    return len(values)


def _contents(values: Any, _: None) -> Any:
    return values.tobytes() if isinstance(values, np.ndarray) else str(sorted(map(repr, values)))


def _slot(holder: Any, key: str) -> Any:
    return getattr(holder, key, _MISSING)


def _content(cell: Any, _: None) -> Any:
    return cell.cell_contents


def _of_dict(name: str, value: dict[Any, Any]) -> Iterator[_Place]:
    for key, item in list(value.items()):
        yield (f"{name}.{key}" if name else str(key)), value.get, key, item


def _of_function(function: FunctionType) -> Iterator[_Place]:
    if _of_others(function):
        return
    for key, cell in bound_cells(function):
        yield key, partial(_content, cell), None, cell.cell_contents
    for _, names in loads(function.__code__):
        scope, path = function.__globals__, []
        for name in names:
            held, read = scope.get(name), scope.get
            path.append(name)
            if isinstance(held, ModuleType):
                if _is_other(held.__name__):
                    break
                scope = vars(held)
                continue
            if name in scope:
                yield ".".join(path), read, name, held
            break
    yield "", None, None, function.__defaults__
    yield from _of_dict("", function.__kwdefaults__ or {})
    yield from _of_dict("", vars(function))


def _of_object(name: str, value: Any, hidden: Callable[[Any, str], bool]) -> Iterator[_Place]:
    attributes = getattr(value, "__dict__", {})
    inner = _OF_EVERY_MODULE if isinstance(value, nn.Module) else ()
    private = isinstance(value, nn.Module) and _of_others(type(value))
    for key, item in list(attributes.items()):
        if key in inner or hidden(value, key):
            continue
        # What a library's module collects as it runs, such as an autoguide's plates.
        if private and (key.startswith("_") or isinstance(item, dict | list | tuple)):
            continue
        yield (f"{name}.{key}" if name else key), attributes.get, key, item
    for base in type(value).__mro__:
        if not _of_others(base):
            for key, item in list(vars(base).items()):
                if not key.startswith("__") or isinstance(item, FunctionType):
                    yield key, vars(base).get, key, item
                # A default, which an attribute of the object's own may come to hide.
                if isinstance(item, _DATA) and not key.startswith("__") and key not in attributes:
                    if not hidden(value, key):
                        yield (f"{name}.{key}" if name else key), attributes.get, key, None
            slots = vars(base).get("__slots__", ())
            for key in (slots,) if isinstance(slots, str) else slots:
                yield f"{name}.{key}", partial(_slot, value), key, _slot(value, key)


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


def names_read(owner: Any, functions: Iterable[Any]) -> frozenset[str] | None:
    """Name what functions read of an object, by themselves and by its methods that they call.

    Returns:
        The names in their code; None where code looks attributes up by names that it computes.

    Example:
        >>> sorted(names_read(object(), [lambda counter: counter.steps + counter.start]))
        ['start', 'steps']
    """
    pending = [inspect.unwrap(getattr(each, "__func__", each)) for each in functions]
    names: set[str] = set()
    seen: set[CodeType] = set()
    while pending:
        function = pending.pop()
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        for name in _names_of(function.__code__) - names:
            names.add(name)
            for base in type(owner).__mro__:
                held = vars(base).get(name)
                if held is not None and not _of_others(base):
                    held = getattr(held, "fget", None) or getattr(held, "__func__", held)
                    pending.append(inspect.unwrap(held))
    return None if names & _BY_NAME else frozenset(names)


_BY_NAME = {"getattr", "vars", "__dict__", "__getattribute__", "attrgetter"}


def _names_of(code: CodeType) -> set[str]:
    inner = (_names_of(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)


def _of_others(value: Any) -> bool:
    return _is_other(value.__module__ or "")


def _is_other(module: str) -> bool:
    top = module.partition(".")[0]
    return top in _OTHERS or is_library(module) or top in sys.stdlib_module_names
