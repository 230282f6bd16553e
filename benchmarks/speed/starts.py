"""Seconds to the first compiled steps, with nothing kept on disk and with all of it."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed import job as jobs
from benchmarks.speed.clock import Clock
from benchmarks.speed.entry import Entry
from benchmarks.speed.methods import Method
from benchmarks.speed.rounds import Settings
from benchmarks.speed.workers import Failed, Worker
from benchmarks.speed.workloads import WORKLOADS

# Where torch and JAX keep compiled code; JAX keeps none unless told, and none that is small.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")
KEEP_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclass
class Start(Entry):
    """Seconds from loaded data to the end of the third step, imports of compilers included.

    A trace is made at the first step, compared with eager at the second, and runs from then on.
    """

    cold: float | None = None
    warm: float | None = None


def starts(ctx: Any, key: str, methods: Iterable[Method], settings: Settings) -> list[Start]:
    """Start each method twice, in new processes, one after another: cold, then warm."""
    workload, found = WORKLOADS[key], []
    rows = min(workload.rows, settings.rows or workload.rows)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.npz"
        jobs.save(key, rows, data)
        for method in methods:
            start = Start(key, method.key, method.title, missing=method.missing(settings.device))
            found.append(start)
            if start.missing is not None:
                continue
            cache = str(Path(name) / f"cache-{method.key}")
            for field in ("cold", "warm"):
                options = {
                    "threads": settings.threads,
                    "clock": partial(Clock, warmup=0.0),
                    "batch_size": min(workload.batch_size, rows // 2),
                    "folder": Path(name) / method.key,
                    "device": settings.device,
                    "environment": {**dict.fromkeys(CACHES, cache), **KEEP_ALL},
                }
                worker = Worker(ctx, method, key, data, options)
                try:
                    setattr(start, field, worker.receive().first_steps)
                except Failed as error:
                    start.failure = str(error)
                finally:
                    worker.stop()
    return found
