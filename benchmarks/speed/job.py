"""A workload with its data, as a method gets it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.workloads import WORKLOADS
from benchmarks.speed.workloads.base import Arrays, Constants, Workload


@dataclass(frozen=True)
class Job:
    """One workload's data, the same for every method, and where files may be written.

    ``decay`` multiplies the learning rate at each step.
    """

    workload: Workload
    arrays: Arrays
    constants: Constants
    batch_size: int
    folder: Path
    device: str = "cpu"
    decay: float = 1.0

    @property
    def lr(self) -> float:
        """The learning rate at the first step.

        That of a workload is for a rate that decays: at the flights' 0.02 throughout the guide
        diverges after some 2,000 steps.
        """
        return self.workload.lr if self.decay != 1 else self.workload.lr / 10

    @property
    def rows(self) -> int:
        return len(self.arrays[0])


def save(key: str, rows: int, path: Path) -> None:
    """Make a workload's data and write them, so that each process need not."""
    arrays, constants = WORKLOADS[key].make(rows)
    numbered = {f"array_{number}": array for number, array in enumerate(arrays)}
    np.savez(path, **numbered, **{f"constant_{name}": c for name, c in constants.items()})


def load(key: str, path: Path, **options: Any) -> Job:
    """Read what :func:`save` wrote."""
    with np.load(path) as file:
        count = sum(name.startswith("array_") for name in file.files)
        arrays = tuple(file[f"array_{number}"] for number in range(count))
        names = [name for name in file.files if name.startswith("constant_")]
        constants = {name.removeprefix("constant_"): file[name] for name in names}
    return Job(WORKLOADS[key], arrays, constants, **options)
