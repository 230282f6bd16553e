"""The parts of a workload that every method is given, so that all train the same model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, ...]
Constants = dict[str, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """A model, its data and how it is trained.

    A model is two functions: ``prior()`` draws what stands outside the data plate, and
    ``likelihood(latents, *rows)`` says what stands in it. How the plate is written is what the
    methods differ in. An amortised guide is a third, ``variational(*rows)``, in the data plate.

    Attributes:
        key: Its short name.
        title: What it is, in words.
        rows: N.
        batch_size: B.
        make: Makes arrays of N rows, and constants of the model by name, from N.
        pyro: Makes a ``PyroModule`` with these functions from the constants.
        numpyro: Makes an object with these functions from the constants; imports JAX.
        lr: Adam's learning rate.
        betas: Adam's other rates.
        guide: The autoguide's name, the same in both libraries; None for ``variational``.
        init_to_mean: Whether that guide begins at the prior's means.
        local: Whether there are latents in the data plate with parameters of each row.
    """

    key: str
    title: str
    rows: int
    batch_size: int
    make: Callable[[int], tuple[Arrays, Constants]]
    pyro: Callable[[Constants], Any]
    numpyro: Callable[[Constants], Any]
    lr: float = 1e-2
    betas: tuple[float, float] = field(default=(0.9, 0.999))
    guide: str | None = "AutoNormal"
    init_to_mean: bool = False
    local: bool = False
