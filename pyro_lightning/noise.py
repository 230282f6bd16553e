"""Random numbers of its own for each of several processes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def noise_of_rank(
    rank: int, world_size: int, device: torch.device, in_python: bool = False
) -> Iterator[None]:
    """Draw, within the context, other random numbers on each rank.

    After one seed for all ranks their generators are equal, and draw equal noise: R ranks would
    then know no more than one. Here all draw R seeds from the default generator, and rank r
    goes on from the r-th. Afterwards the generators are as on a run without noise: equal on all
    ranks, so that a sampler that draws one order everywhere and takes its share still does. The
    noise follows from the state of the default generator and the rank alone, so that a checkpoint
    that keeps that state keeps the noise.

    Args:
        rank: r.
        world_size: R.
        device: Whose generator is seeded beside the CPU's.
        in_python: Whether Python's and NumPy's generators are, too; they cost more than torch's.

    Example:
        >>> draws = []
        >>> for rank in range(2):
        ...     _ = torch.manual_seed(0)
        ...     with noise_of_rank(rank, 2, torch.device("cpu")):
        ...         draws.append(torch.rand(()))
        >>> bool(draws[0] == draws[1])
        False
    """
    seed = torch.empty(world_size, dtype=torch.int64, device="cpu").random_().tolist()[rank]
    with noise_from(seed, device, in_python):
        yield


@contextmanager
def noise_from(seed: int, device: torch.device, in_python: bool = False) -> Iterator[None]:
    """Draw, within the context, the random numbers of a seed; generators are put back afterwards.

    Args:
        seed: The seed.
        device: Whose generator is seeded beside the CPU's.
        in_python: Whether Python's and NumPy's generators are, too.
    """
    before = (random.getstate(), np.random.get_state()) if in_python else None
    here, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    try:
        with torch.random.fork_rng(here, device_type=kind):
            # torch.manual_seed would seed every device of the machine, at twenty times the cost.
            torch.default_generator.manual_seed(seed)
            if here:
                getattr(torch, kind).manual_seed(seed)
            if in_python:
                random.seed(seed)
                np.random.seed(seed % 2**32)
            yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])


def drawn_seed() -> int:
    """Draw a seed from torch's default generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def derived_seed(seed: int, *numbers: int) -> int:
    """Make another seed from a seed and numbers, the same in every process.

    Example:
        >>> derived_seed(0, 1, 2) == derived_seed(0, 1, 2) != derived_seed(0, 2, 1)
        True
    """
    return random.Random(repr((seed, *numbers))).getrandbits(63)
