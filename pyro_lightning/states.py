"""Leaving random states and buffers as they were."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_lightning.random_states import set_torch_states, torch_states

_Result = TypeVar("_Result")


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Put back the buffers of a module, such as the running statistics of BatchNorm."""
    buffers = _kept_buffers(module)
    try:
        yield
    finally:
        _put_back(module, buffers)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module as validation does, in evaluation mode; then put back its modes and buffers.

    Lightning leaves a module in training mode after a fit, in which Dropout makes noise and
    BatchNorm reads the other rows of a batch; and it sets the precision of ``64-true`` in steps
    alone, without which priors draw in single precision what meets data in double.
    """
    training = [part for part in module.modules() if part.training]
    with preserved_buffers(module), default_dtype(_precision_of(module)):
        module.eval()
        try:
            yield
        finally:
            for part in training:  # not all parts: users freeze some
                part.training = True


def _precision_of(module: nn.Module) -> torch.dtype:
    now, made = torch.get_default_dtype(), getattr(module, "_first_dtype", None)
    double = made == torch.float64 and any(p.dtype == made for p in module.parameters())
    return torch.float64 if double and now == torch.float32 else now


def forked_noise() -> Any:
    """Make the context after which torch's generators are as before, on all devices in use.

    Without a list of devices torch would start CUDA, which no process that is forked afterwards
    could use, and warn where a machine has several.
    """
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.random.fork_rng(range(torch.cuda.device_count()) if used else [])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors in a precision, as a Trainer's ``precision`` does in a step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def preserved_state(module: nn.Module) -> Iterator[None]:
    """Put back the random states of Python, NumPy and torch, and the buffers of a module."""
    put_back = kept_state(module)
    try:
        yield
    finally:
        put_back()


@contextmanager
def preserved_generators(generators: Iterable[Any]) -> Iterator[None]:
    """Put back the states of generators of Python, NumPy and torch.

    Example:
        >>> generator = random.Random(0)
        >>> with preserved_generators([generator]):
        ...     first = generator.random()
        >>> generator.random() == first
        True
    """
    states: list[tuple[Callable[[Any], None], Any]] = []
    for each in generators:
        if isinstance(each, np.random.Generator):
            states.append((partial(setattr, each.bit_generator, "state"), each.bit_generator.state))
        elif isinstance(each, random.Random):
            states.append((each.setstate, each.getstate()))
        else:
            states.append((each.set_state, each.get_state()))
    try:
        yield
    finally:
        for put, state in states:
            put(state)


def kept_state(module: nn.Module) -> Callable[[], None]:
    """Remember random states and buffers of a module; returns what puts them back."""
    noise, buffers = kept_noise(), _kept_buffers(module)

    def put_back() -> None:
        noise()
        _put_back(module, buffers)

    return put_back


def kept_tensors(module: nn.Module) -> Callable[[], None]:
    """Remember buffers of a module and random states of its device; returns what puts them back.

    That is all that a compiled step changes besides parameters, and takes a few microseconds.
    """
    device, buffers = getattr(module, "device", None), _kept_buffers(module)
    noise = torch_states(device)

    def put_back() -> None:
        set_torch_states(noise, device)
        _put_back(module, buffers)

    return put_back


def kept_noise() -> Callable[[], None]:
    """Remember the random states of Python, NumPy and torch; returns what puts them back."""
    python, numpy, noise = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Of devices in use: CUDA is not started by a look at it.
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    on_gpus = torch.cuda.get_rng_state_all() if used else []

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(noise)
        torch.cuda.set_rng_state_all(on_gpus)

    return put_back


def _kept_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in module.named_buffers() if not is_lazy(b)}


def _put_back(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def drawing_in_python() -> Callable[[], bool]:
    """Return what tells whether Python's or NumPy's random numbers were drawn from now on."""
    python, numpy = random.getstate(), np.random.get_state()

    def drew() -> bool:
        alike = all(map(np.array_equal, numpy, np.random.get_state()))
        return random.getstate() != python or not alike

    return drew


def drawing(run: Callable[[], _Result]) -> tuple[_Result, bool]:
    """Run something; tells whether it drew random numbers, which are then put back.

    Example:
        >>> drawing(lambda: 1)
        (1, False)
        >>> drawing(lambda: torch.rand(3))[1]
        True
    """
    put_back, noise = kept_noise(), torch.get_rng_state()
    in_python = drawing_in_python()
    result = run()
    drew = in_python() or not torch.equal(noise, torch.get_rng_state())
    if drew:
        put_back()
    return result, drew
