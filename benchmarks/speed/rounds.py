"""Methods in turn, round by round, so that a machine that slows down slows all of them."""

import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import job as jobs
from benchmarks.speed.clock import Chunk, Clock
from benchmarks.speed.entry import Entry
from benchmarks.speed.methods import Method
from benchmarks.speed.workers import Failed, Worker
from benchmarks.speed.workloads import WORKLOADS


@dataclass
class Result(Entry):
    """What was measured of one method on one workload."""

    rows: int = 0
    chunks: list[Chunk] = field(default_factory=list)

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
        pairs = zip(than.chunks, self.chunks, strict=False)  # one may have failed in between
        return median(theirs.microseconds / mine.microseconds for theirs, mine in pairs)

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "chunks": [chunk._asdict() for chunk in self.chunks]}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Any:
        return cls(**{**entry, "chunks": [Chunk(**chunk) for chunk in entry["chunks"]]})


@dataclass(frozen=True)
class Settings:
    """How long is measured, and how."""

    rounds: int = 5
    seconds: float = 1.0
    warmup: float = 1.0
    threads: int = 1
    rows: int | None = None
    batch_size: int | None = None
    device: str = "cpu"


def measure(
    ctx: Any, key: str, methods: Iterable[Method], settings: Settings, rows: int | None = None
) -> list[Result]:
    """Measure methods on one workload; what is missing is noted, what fails too.

    Args:
        ctx: What makes processes.
        key: The workload's.
        methods: What is measured.
        settings: How; its ``rows`` is an upper bound.
        rows: N, where it is not the workload's.
    """
    workload = WORKLOADS[key]
    rows = rows or min(workload.rows, settings.rows or workload.rows)
    batch_size = min(workload.batch_size, settings.batch_size or workload.batch_size)
    results, workers = [], {}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.npz"
        jobs.save(key, rows, data)
        try:
            for method in methods:
                missing = method.missing(settings.device)
                result = Result(key, method.key, method.title, rows=rows, missing=missing)
                results.append(result)
                if missing is None:
                    options = {
                        "threads": settings.threads,
                        "clock": partial(Clock, warmup=settings.warmup),
                        "batch_size": batch_size,
                        "folder": Path(name) / method.key,
                        "device": settings.device,
                        "environment": {},
                    }
                    workers[method.key] = partial(Worker, ctx, method, key, data, options)
            workers = _warm(workers, results)
            for number in range(settings.rounds):
                # Every other round backwards: who comes after whom must not matter.
                for result in results[:: 1 if number % 2 == 0 else -1]:
                    if result.method in workers and result.failure is None:
                        try:
                            result.chunks.append(workers[result.method].turn(settings.seconds))
                        except Failed as error:
                            result.failure = str(error)
        finally:
            for worker in workers.values():
                if isinstance(worker, Worker):
                    worker.stop()
    return results


def _warm(makers: dict[str, Any], results: list[Result]) -> dict[str, Worker]:
    """Start methods, as many at once as there are cores, and wait until they are warm."""

    def begin(result: Result) -> tuple[str, Worker] | None:
        if result.method not in makers:
            return None
        worker: Worker = makers[result.method]()
        try:
            worker.receive()
        except Failed as error:
            result.failure = str(error)
            worker.stop()
            return None
        return result.method, worker

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(filter(None, pool.map(begin, results)))
