"""The share of time that a GPU computes while a method trains, by torch's profiler."""

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.speed import job as jobs
from benchmarks.speed.clock import Clock, Stopped
from benchmarks.speed.entry import Entry
from benchmarks.speed.methods import Method
from benchmarks.speed.rounds import Settings
from benchmarks.speed.workers import Failed, Worker
from benchmarks.speed.workloads import WORKLOADS

SECONDS = 2.0  # that are profiled


class ProfilingClock(Clock):
    """Profiles the device from the end of the warm-up on, and sends the share of time it is busy.

    Kernels and copies count, those that overlap once. The profiler slows the host down a little,
    so that the share is a lower bound.
    """

    def __init__(self, pipe: Connection, warmup: float) -> None:
        super().__init__(pipe, warmup)
        self._profiler: Any = None

    def _pause(self, steps: int) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        self.sync()
        now = time.perf_counter()
        if self._first is None:
            if steps >= self.first_steps:
                self._first, self._until = now, now + self.warmup
            return
        if self._profiler is None:
            self._profiler = profile(activities=[ProfilerActivity.CUDA])
            self._profiler.start()
            self._from = time.perf_counter()
            self._until = self._from + SECONDS
            return
        self._profiler.stop()
        events = self._profiler.events()
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
        self.pipe.send(covered(spans) / 1e6 / (now - self._from))
        raise Stopped


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans.

    Example:
        >>> covered([(0, 2), (1, 3), (5, 6)])
        4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass
class Busy(Entry):
    """The share of time that the GPU computes or copies."""

    share: float | None = None


def busy(ctx: Any, key: str, methods: Iterable[Method], settings: Settings) -> list[Busy]:
    """Profile the methods that use torch on the GPU, one after another."""
    workload, found = WORKLOADS[key], []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.npz"
        jobs.save(key, workload.rows, data)
        for method in methods:
            if method.needs == "numpyro":
                continue  # torch's profiler does not see JAX
            entry = Busy(key, method.key, method.title, missing=method.missing(settings.device))
            found.append(entry)
            if entry.missing is not None:
                continue
            options = {
                "threads": settings.threads,
                "clock": partial(ProfilingClock, warmup=settings.warmup),
                "batch_size": workload.batch_size,
                "folder": Path(name) / method.key,
                "device": settings.device,
                "environment": {},
            }
            worker = Worker(ctx, method, key, data, options)
            try:
                entry.share = worker.receive()
            except Failed as error:
                entry.failure = str(error)
            finally:
                worker.stop()
    return found
