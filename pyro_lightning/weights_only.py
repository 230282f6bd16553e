"""What a checkpoint may hold so that ``torch.load(weights_only=True)`` reads it."""

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import torch
from torch import nn

from pyro_lightning.arguments import shortly

_PLAIN = {type(None), bool, int, float, str, torch.Tensor, nn.Parameter}


def refuse_code(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that would be written and could not be read without running its code.

    Args:
        checkpoint: What is about to be written.

    Raises:
        TypeError: Naming each object that stands in the way, where it is, and what to do.

    Example:
        >>> refuse_code({"state_dict": {"w": torch.zeros(3)}, "hyper_parameters": {"lr": 0.1}})
        >>> refuse_code({"hyper_parameters": {"act": torch.tanh}})
        Traceback (most recent call last):
        TypeError: ...save_hyperparameters(ignore=['act'])...
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"a checkpoint must be a dict, got {shortly(checkpoint)}")
    found = [
        (f"checkpoint[{key!r}]{path}", kind)
        for key, part in checkpoint.items()
        for path, kind in _refused(part, "")
    ]
    if not found:
        return
    arguments = sorted(
        {
            name
            for key in ("hyper_parameters", "datamodule_hyper_parameters")
            for name, value in dict(checkpoint.get(key) or {}).items()
            if any(_refused(value, ""))
        }
    )
    remedy = (
        "Let state_dict() and on_save_checkpoint() give tensors, numbers, strings, and lists and "
        "dicts of them; or trust the class, by torch.serialization.add_safe_globals."
    )
    if arguments:
        remedy = (
            f"Leave them out, self.save_hyperparameters(ignore={arguments!r}), and give them again "
            "where the checkpoint is loaded: load_from_checkpoint(path, "
            f"{', '.join(f'{name}=...' for name in arguments)})."
        )
    raise TypeError(
        "the checkpoint would hold "
        + ", ".join(f"a {kind} ({path})" for path, kind in found[:5])
        + ", which torch.load(weights_only=True) refuses, since reading it runs code. "
        + remedy
    )


def _refused(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Walk what cannot be read, with the expression that reaches it and the name of its type."""
    kind = type(value)
    if kind in _PLAIN:
        return
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            yield from _refused(key, f"{path}, key {key!r}")
            yield from _refused(item, f"{path}[{key!r}]")
    elif kind in (list, tuple):
        for number, item in enumerate(value):
            yield from _refused(item, f"{path}[{number}]")
    elif not _is_read(value):
        name = getattr(value, "__qualname__", None)
        kind_name = "class" if isinstance(value, type) else kind.__name__
        yield path, kind_name if name is None else f"{kind_name} '{name}'"


def _is_read(value: Any) -> bool:
    """Whether torch reads an object back; of its own kinds, and of those that are trusted."""
    file = BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError):  # each of them is a pickler's refusal
        return False
    return True
