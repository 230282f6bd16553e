"""Results as files, and read back from them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.speed.answer import Answer
from benchmarks.speed.busy import Busy
from benchmarks.speed.rounds import Result
from benchmarks.speed.starts import Start

KINDS = {"steps": Result, "flat": Result, "starts": Start, "answers": Answer, "busy": Busy}
Found = dict[str, list[Any]]


def write(path: Path, about: dict[str, Any], found: Found) -> None:
    """Write every chunk of every round, so that whatever is asked later can be computed."""
    listed = {kind: [entry.as_dict() for entry in entries] for kind, entries in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, **listed}, indent=1))


def read(paths: Iterable[Path]) -> tuple[dict[str, Any], Found]:
    """Join files: of a workload and method that several have measured the last counts."""
    about: dict[str, Any] = {}
    joined: dict[str, dict[Any, Any]] = {}
    for path in paths:
        found = json.loads(path.read_text())
        load = max(found["about"]["load"] or 0.0, about.get("load") or 0.0)
        about = {**found.pop("about"), "load": load}
        for kind, entries in found.items():
            for entry in map(KINDS[kind].from_dict, entries):
                key = entry.workload, getattr(entry, "rows", None), entry.method
                joined.setdefault(kind, {})[key] = entry
    return about, {kind: list(entries.values()) for kind, entries in joined.items()}


def by_workload(results: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for result in results:
        found.setdefault(result.workload, []).append(result)
    return dict(sorted(found.items()))
