"""The tensors of a batch's arguments, apart from their structure."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from pyro_lightning.tracing import Untraceable

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Flat(NamedTuple):
    """The arguments of a model, taken apart.

    Attributes:
        tensors: Their tensors.
        structure: All else, hashable: containers, constants, shapes, strides, types and devices.
        rebuilt: Puts other tensors in the places of these.
    """

    tensors: list[torch.Tensor]
    structure: Any
    rebuilt: Callable[[Iterator[torch.Tensor]], Any]


def flatten(value: Any, path: str = "the batch") -> Flat:
    """Take nested tuples, lists and mappings of tensors and constants apart.

    Raises:
        Untraceable: For anything else in it.

    Example:
        >>> flat = flatten({"x": torch.zeros(2), "k": 3})
        >>> flat.tensors, flat.rebuilt(iter([torch.ones(2)]))
        ([tensor([0., 0.])], {'x': tensor([1., 1.]), 'k': 3})
    """
    if isinstance(value, torch.Tensor):
        if value.requires_grad or value.layout != torch.strided:
            raise Untraceable(f"{path} holds a tensor that is sparse or requires a gradient")
        described = (tuple(value.shape), value.stride(), value.dtype, value.device)
        return Flat([value], described, next)
    if isinstance(value, Mapping):
        parts = [flatten(item, f"{path}[{key!r}]") for key, item in value.items()]
        keys = list(value)
        return _joined(parts, ("mapping", *keys), lambda items: dict(zip(keys, items, strict=True)))
    if isinstance(value, tuple | list):
        kind = type(value)
        parts = [flatten(item, f"{path}[{number}]") for number, item in enumerate(value)]
        if hasattr(kind, "_fields"):
            return _joined(parts, (kind,), lambda items: kind(*items))
        return _joined(parts, (kind,), lambda items: kind(items))
    if isinstance(value, _CONSTANTS):
        return Flat([], (type(value), value), lambda tensors: value)
    raise Untraceable(f"{path} holds a {type(value).__name__}, which is no tensor")


def _joined(parts: list[Flat], kind: Any, build: Callable[[list[Any]], Any]) -> Flat:
    tensors = [tensor for part in parts for tensor in part.tensors]
    structure = (kind, *(part.structure for part in parts))
    return Flat(tensors, structure, lambda given: build([part.rebuilt(given) for part in parts]))
