"""Results as tables: on the terminal, and in Markdown for the documentation."""

from collections.abc import Iterable
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.results import by_workload
from benchmarks.speed.rounds import Result
from benchmarks.speed.workloads import WORKLOADS

# What ratios are taken against: Pyro's own Lightning example on its own model, plain Pyro else.
BASELINES = {"W1": "example"}


def baseline(results: list[Result]) -> Result | None:
    """The method that the others of a workload are compared with."""
    key = BASELINES.get(results[0].workload, "raw")
    return next((r for r in results if r.method == key and r.measured), None)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def _ratio(result: Result, than: Result | None) -> str:
    return "" if than is None else number(result.times_faster(than))


def heading(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    settings = about["settings"]
    return (
        f"{about['date']}, {about['cores']} cores of {about['processor']}, threads: "
        f"{settings['threads']}, load before: {about['load']:.1f}; medians of "
        f"{settings['rounds']} rounds of {settings['seconds']} s; {versions}"
    )


def show(console: Console, about: dict[str, Any], results: Iterable[Result]) -> None:
    """Print a table of each workload, and what was left out and why."""
    listed = list(results)
    console.print(heading(about), highlight=False)
    for key, found in by_workload(listed).items():
        base = baseline(found)
        fed = next((r for r in found if r.method == "numpyro" and r.measured), None)
        columns = ["us a step", "quartiles", "cpu us", "times as fast", "as NumPyro", "1st, s"]
        table = Table("method", title=f"{key}: {WORKLOADS[key].title}")
        for column in columns:
            table.add_column(column, justify="right")
        for result in found:
            if not result.measured:
                continue
            times = [chunk.microseconds for chunk in result.chunks]
            low, _, high = quantiles(times) if len(times) > 1 else times * 3
            table.add_row(
                result.title,
                number(result.microseconds),
                f"{number(low)} - {number(high)}",
                number(result.processor),
                _ratio(result, base),
                _ratio(result, fed),
                number(result.first_step),
            )
        console.print(table)
        if base is not None:
            console.print(
                f"times as fast: as '{base.title}'; as NumPyro: as its jit(svi.update); cpu us: "
                "processor time of all threads a step; 1st, s: to the first step, compiled anew"
            )
    for title, reason in {r.title: r.missing for r in listed if r.missing is not None}.items():
        console.print(f"left out: {title}: {reason}", markup=False)
    for result in listed:
        if result.failure is not None:
            console.print(f"FAILED: {result.workload}: {result.failure}", markup=False)


def markdown(about: dict[str, Any], results: Iterable[Result]) -> str:
    """One table of all workloads: microseconds a step, and how many times as fast."""
    found = by_workload(results)
    titles = {r.method: r.title for rs in found.values() for r in rs if r.measured}
    lines = [
        f"| us a step (times as fast as the baseline, in bold) | {' | '.join(found)} |",
        f"| --- |{' --- |' * len(found)}",
    ]
    for method, title in titles.items():
        cells = []
        for rs in found.values():
            result = next((r for r in rs if r.method == method and r.measured), None)
            cells.append("-" if result is None else _cell(result, baseline(rs)))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", heading(about)])


def _cell(result: Result, base: Result | None) -> str:
    text = number(result.microseconds)
    if base is None:
        return text
    return f"**{text}**" if result is base else f"{text} ({_ratio(result, base)})"
