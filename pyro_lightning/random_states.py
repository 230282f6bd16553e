"""Random states of a process, in a form that a checkpoint can hold."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

_NUMPYS = "MT19937"  # the generator behind NumPy's functions, unless a program has put in another


def random_states(device: torch.device | None = None) -> dict[str, Any]:
    """Return the states of torch's, Python's and NumPy's default generators.

    They consist of tensors and numbers, which ``torch.load(weights_only=True)`` reads.

    Args:
        device: A CUDA device whose generator is read, too.

    Example:
        >>> states = random_states()
        >>> first = torch.rand(2)
        >>> set_random_states(states)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    states, (version, words, gauss) = torch_states(device), random.getstate()
    states["python"] = version, torch.tensor(words, dtype=torch.int64), gauss
    numpys: Any = np.random.get_state()
    name, keys, *numbers = numpys
    if name == _NUMPYS:
        states["numpy"] = (torch.tensor(keys.astype(np.int64)), *map(float, numbers))
    return states


def torch_states(device: torch.device | None = None) -> dict[str, Any]:
    """Return those of :func:`random_states` that are torch's, in microseconds."""
    states = {"torch": torch.get_rng_state()}
    if device is not None and device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device | None = None) -> None:
    """Put back what :func:`random_states` returned.

    Args:
        states: The states.
        device: The CUDA device whose generator gets the state of the one that was read.
    """
    set_torch_states(states, device)
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if "numpy" in states:
        keys, position, has_gauss, cached = states["numpy"]
        kept = keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached
        np.random.set_state((_NUMPYS, *kept))


def set_torch_states(states: dict[str, Any], device: torch.device | None = None) -> None:
    """Put back what :func:`torch_states` returned."""
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def generator_states(generators: Iterable[torch.Generator]) -> list[torch.Tensor]:
    """Return the states of generators of a program's own."""
    return [generator.get_state() for generator in generators]


def set_generator_states(
    generators: Iterable[torch.Generator], states: Iterable[torch.Tensor]
) -> None:
    """Put back what :func:`generator_states` returned."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu())
