"""What users pass, read as what it must be, or refused by the name of the argument."""

import math
import operator
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_BOOLS = (torch.bool, np.dtype(bool))
_MOST = 2**63 - 1  # what torch counts with


def read_count(value: Any, name: str, least: int = 1) -> int:
    """Read a whole number; a float that is one, as 1e6, will do.

    Raises:
        TypeError: For what is no whole number.
        ValueError: For one that is too small, or too large for torch.

    Example:
        >>> read_count(1e6, "dataset_size")
        1000000
        >>> read_count("7", "dataset_size")
        Traceback (most recent call last):
        ...
        TypeError: dataset_size must be a whole number, got '7'
    """
    if type(value) is int and least <= value <= _MOST:
        return value
    number = _whole(value)
    if number is None:
        raise TypeError(f"{name} must be a whole number, got {shortly(value)}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if number > _MOST:
        raise ValueError(f"{name} must be at most 2**63 - 1, got {number}")
    return number


def _whole(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or getattr(value, "dtype", None) in _BOOLS or _ndim(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError):  # torch raises either
        return None


def _ndim(value: Any) -> int:
    return value.ndim if isinstance(value, torch.Tensor | np.ndarray) else 0


def read_flag(value: Any, name: str) -> bool:
    """Read True or False.

    Raises:
        TypeError: For anything else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shortly(value)}")
    return value


def read_choice(value: Any, name: str, choices: tuple[Any, ...]) -> Any:
    """Read one of a few values, apart from others that are equal to it, as 1 to True.

    Raises:
        ValueError: Naming the choices.
    """
    if not any(type(value) is type(each) and value == each for each in choices):
        listed = ", ".join(f'"{c}"' if isinstance(c, str) else repr(c) for c in choices[:-1])
        last = f'"{choices[-1]}"' if isinstance(choices[-1], str) else repr(choices[-1])
        raise ValueError(f"{name} must be {listed} or {last}, got {shortly(value)}")
    return value


def read_fraction(value: Any, name: str) -> float:
    """Read a number in [0, 1).

    Raises:
        TypeError: For what is no number.
        ValueError: For one outside.
    """
    number = _real(value)
    if number is None:
        raise TypeError(f"{name} must be a number in [0, 1), got {shortly(value)}")
    if not 0 <= number < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {number}")
    return number


def read_number(value: Any, name: str, *, positive: bool = False, finite: bool = True) -> float:
    """Read a number that is not negative.

    Args:
        value: What was passed.
        name: As what.
        positive: Whether 0 is refused.
        finite: Whether infinity is refused.

    Raises:
        TypeError: For what is no number.
        ValueError: For one that is refused, or NaN.
    """
    number = _real(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {shortly(value)}")
    if not number >= 0 or (positive and number == 0) or (finite and number == math.inf):
        kind = f"{'finite and ' * finite}{'above 0' if positive else 'at least 0'}"
        raise ValueError(f"{name} must be {kind}, got {number}")
    return number


def read_tensor(value: Any, name: str) -> torch.Tensor:
    """Read a tensor of real numbers.

    Raises:
        TypeError: For anything else.
    """
    if not isinstance(value, torch.Tensor) or value.is_complex():
        raise TypeError(f"{name} must be a tensor of real numbers, got {shortly(value)}")
    return value


def read_sizes(value: Any, name: str) -> dict[str, int]:
    """Read a mapping of names to whole numbers.

    Raises:
        TypeError: For anything else.
        ValueError: For a number below 1.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name} must be a dict of names and sizes, got {shortly(value)}")
    return {key: read_count(size, f"the size of '{key}' in {name}") for key, size in value.items()}


def _real(value: Any) -> float | None:
    if isinstance(value, str | bytes | bool) or getattr(value, "dtype", None) in _BOOLS:
        return None
    if isinstance(value, torch.Tensor | np.ndarray) and math.prod(value.shape) != 1:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def read_callable(value: Any, name: str, expected: str) -> Any:
    """Read None, or something to call.

    Raises:
        TypeError: Saying what is expected.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be {expected}, got {shortly(value)}")
    return value


def read_device(value: Any) -> Any:
    """Read None, ``"auto"`` or a device.

    Raises:
        TypeError: For what names no device.
        ValueError: For a name that torch does not know.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    if not isinstance(value, str | torch.device):
        raise TypeError(f'device must be None, "auto" or a device, got {shortly(value)}')
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f'device must be None, "auto" or a device, got {value!r}') from error


def read_path(value: Any, name: str) -> Any:
    """Read a path or an address, or an open file.

    Raises:
        TypeError: For anything else, as a number, which Python takes for an open file's.
        ValueError: For a path that no system knows.
    """
    if not isinstance(value, str | os.PathLike) and not hasattr(value, "read"):
        raise TypeError(f"{name} must be a path, an address or an open file, got {shortly(value)}")
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} must be a path without null bytes, got {value!r}")
    return value


def read_map_location(value: Any, name: str = "map_location") -> Any:
    """Read where ``torch.load`` puts tensors.

    Raises:
        TypeError: For what is neither a device nor a dict or a callable.
        ValueError: For a name that torch does not know.
    """
    if value is None or isinstance(value, torch.device | Mapping) or callable(value):
        return value
    if not isinstance(value, str):
        raise TypeError(
            f"{name} must be a device, a dict of devices or a callable, got {shortly(value)}"
        )
    try:
        torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} must name a device, got {value!r}") from error
    return value


def shortly(value: Any) -> str:
    """Show a value in one short line.

    Example:
        >>> shortly([1] * 1000)
        '[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, ...'
    """
    line = " ".join(repr(value).split())
    return line if len(line) < 50 else f"{line[:46]}..."
