"""Results as a file, and read back from it."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.speed.clock import Chunk
from benchmarks.speed.rounds import Result


def write(path: Path, about: dict[str, Any], results: Iterable[Result]) -> None:
    """Write every chunk of every round, so that whatever is asked later can be computed."""
    listed = [
        {**dataclasses.asdict(r), "chunks": [chunk._asdict() for chunk in r.chunks]}
        for r in results
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "results": listed}, indent=1))


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    about = json.loads(path.read_text())
    listed = about.pop("results")
    for entry in listed:
        entry["chunks"] = [Chunk(**chunk) for chunk in entry["chunks"]]
    return about, [Result(**entry) for entry in listed]


def by_workload(results: Iterable[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.workload, []).append(result)
    return found
