"""Methods in turn, round by round, so that a machine that slows down slows all of them."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import job as jobs
from benchmarks.speed.clock import Chunk, Clock
from benchmarks.speed.methods import Method
from benchmarks.speed.workers import Failed, Worker
from benchmarks.speed.workloads import WORKLOADS


@dataclass
class Result:
    """What was measured of one method on one workload."""

    workload: str
    method: str
    title: str
    first_step: float | None = None
    chunks: list[Chunk] = field(default_factory=list)
    missing: str | None = None  # why it was left out
    failure: str | None = None  # the traceback, where it failed

    @property
    def measured(self) -> bool:
        return bool(self.chunks)

    @property
    def microseconds(self) -> float:
        """Median over rounds, of one SVI step."""
        return median(chunk.microseconds for chunk in self.chunks)

    @property
    def processor(self) -> float:
        """The same in processor time of all threads: other programs count less in it."""
        return median(1e6 * chunk.cpu / chunk.steps for chunk in self.chunks)

    def times_faster(self, than: "Result") -> float:
        """Median over rounds of the ratio of both within one round."""
        pairs = zip(than.chunks, self.chunks, strict=True)
        return median(theirs.microseconds / mine.microseconds for theirs, mine in pairs)


@dataclass(frozen=True)
class Settings:
    """How long is measured, and how."""

    rounds: int = 7
    seconds: float = 1.5
    warmup: float = 2.0
    threads: int = 1
    rows: int | None = None
    batch_size: int | None = None
    device: str = "cpu"


def measure(ctx: Any, key: str, methods: Iterable[Method], settings: Settings) -> list[Result]:
    """Measure methods on one workload; what is missing is noted, what fails too."""
    workload = WORKLOADS[key]
    rows = min(workload.rows, settings.rows or workload.rows)
    batch_size = min(workload.batch_size, settings.batch_size or workload.batch_size)
    results, workers = [], []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.npz"
        jobs.save(key, rows, data)
        try:
            for method in methods:
                result = Result(key, method.key, method.title, missing=method.missing())
                results.append(result)
                if result.missing is not None:
                    continue
                # A smaller last batch, or group of batches, may be compiled of its own.
                whole = batch_size * method.options.get("steps_per_batch", 1)
                steps = rows // batch_size + 2 if rows % whole else 2
                options = {
                    "threads": settings.threads,
                    "clock": partial(Clock, warmup=settings.warmup, warmup_steps=steps),
                    "batch_size": batch_size,
                    "folder": Path(name) / method.key,
                    "device": settings.device,
                    "environment": {},
                }
                worker = Worker(ctx, method, key, data, options)
                workers.append(worker)
                try:
                    result.first_step = worker.receive().first_step
                except Failed as error:
                    result.failure = str(error)
                    workers.remove(worker)
                    worker.stop()
            ready = {worker.method.key: worker for worker in workers}
            turns = [result for result in results if result.method in ready]
            for number in range(settings.rounds):
                # Every other round backwards: who comes after whom must not matter.
                for result in turns[:: 1 if number % 2 == 0 else -1]:
                    result.chunks.append(ready[result.method].turn(settings.seconds))
        finally:
            for worker in workers:
                worker.stop()
    return results
