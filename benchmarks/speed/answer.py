"""Seconds until the posterior means of a full-data fit are reached."""

import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed import job as jobs
from benchmarks.speed.clock import Clock, Stopped
from benchmarks.speed.entry import Entry
from benchmarks.speed.methods import Method
from benchmarks.speed.references import REFERENCES
from benchmarks.speed.rounds import Settings
from benchmarks.speed.workers import Failed, Worker
from benchmarks.speed.workloads import WORKLOADS

CLOSE = 0.1  # posterior sds that the farthest mean may lie off
IN_A_ROW = 3  # looks at which it must lie so near: not one by luck
# The learning rate falls to a tenth in so many epochs: the noise of batches would else keep every
# method away for good.
EPOCHS_A_TENTH = {"W1": 5.0, "W5": 400.0}


class Look(NamedTuple):
    """Where a method stands: medians of its latents, after so many seconds and steps."""

    seconds: float
    steps: int
    medians: dict[str, np.ndarray]


class LookingClock(Clock):
    """Sends the medians now and then; the time that this takes does not count."""

    def __init__(self, pipe: Connection, limit: float, every: float) -> None:
        super().__init__(pipe, 0.0)
        self.limit, self.every = limit, every

    def start(self) -> None:
        self._began = self._until = time.perf_counter()

    def _pause(self, steps: int) -> None:
        self.sync()
        now = time.perf_counter()
        seconds = now - self._began
        medians = {name: _array(value) for name, value in self.medians().items()}
        self.pipe.send(Look(seconds, steps, medians))
        if not self.pipe.recv():
            raise Stopped
        self._began += time.perf_counter() - now
        # Looks grow rarer, so that a long fit is not spent on them.
        self._until = time.perf_counter() + max(self.every, 0.01 * seconds)


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, np.float64)


@dataclass
class Answer(Entry):
    """When a method came near, or how near it came."""

    seconds: float = math.nan
    steps: int = 0
    reached: bool = False
    distance: float = math.nan


def _watch(worker: Worker, answer: Answer, reference: Any, limit: float) -> None:
    near: list[Look] = []
    while True:
        look = worker.receive()
        answer.distance = reference.distance(look.medians)
        near = [*near, look] if answer.distance < CLOSE else []
        if len(near) == IN_A_ROW or look.seconds > limit:
            shown = near[0] if near else look
            answer.reached = len(near) == IN_A_ROW
            answer.seconds, answer.steps = shown.seconds, shown.steps
            return
        worker.pipe.send(True)


def answers(
    ctx: Any, key: str, methods: Iterable[Method], settings: Settings, limit: float
) -> list[Answer]:
    """Train with each method, one after another, until its means are near or time is over."""
    workload, found = WORKLOADS[key], []
    rows = min(workload.rows, settings.rows or workload.rows)
    batch_size = min(workload.batch_size, rows // 2)
    steps = EPOCHS_A_TENTH[key] * rows / batch_size
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.npz"
        jobs.save(key, rows, data)
        job = jobs.load(key, data, batch_size=batch_size, folder=Path(name))
        reference = REFERENCES[key](job.arrays, job.constants)
        for method in methods:
            answer = Answer(key, method.key, method.title, missing=method.missing(settings.device))
            found.append(answer)
            if answer.missing is not None:
                continue
            options = {
                "threads": settings.threads,
                "clock": partial(LookingClock, limit=limit, every=0.02),
                "batch_size": batch_size,
                "folder": Path(name) / method.key,
                "decay": 0.1 ** (1 / steps),
                "device": settings.device,
                "environment": {},
            }
            worker = Worker(ctx, method, key, data, options)
            try:
                _watch(worker, answer, reference, limit)
            except Failed as error:
                answer.failure = str(error)
            finally:
                worker.stop()
    return found
