"""Results as tables: on the terminal, and in Markdown for the documentation."""

from collections.abc import Iterable
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.results import Found, by_workload
from benchmarks.speed.rounds import Result
from benchmarks.speed.workloads import WORKLOADS

# What ratios are taken against: Pyro's own Lightning example on its own model, plain Pyro else.
BASELINES = {"W1": "example"}


def baseline(results: list[Result]) -> Result | None:
    """The method that the others of a workload are compared with."""
    return _measured(results, BASELINES.get(results[0].workload, "raw"))


def _measured(results: Iterable[Result], method: str) -> Result | None:
    return next((r for r in results if r.method == method and r.measured), None)


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


def show(console: Console, about: dict[str, Any], found: Found) -> None:
    """Print a table of each workload, and what was left out and why."""
    console.print(heading(about), highlight=False)
    for results in by_workload(found.get("steps", [])).values():
        _show_steps(console, results)
    for kind, make in OTHERS.items():
        header, rows = make(found.get(kind, []))
        if rows:
            table = Table(header[0], title=kind)
            for column in header[1:]:
                table.add_column(column, justify="right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    entries = [entry for each in found.values() for entry in each]
    for title, reason in {e.title: e.missing for e in entries if e.missing is not None}.items():
        console.print(f"left out: {title}: {reason}", markup=False)
    for entry in entries:
        if entry.failure is not None:
            console.print(f"FAILED: {entry.workload}: {entry.failure}", markup=False)


def _show_steps(console: Console, results: list[Result]) -> None:
    base, fed = baseline(results), _measured(results, "numpyro")
    key = results[0].workload
    table = Table("method", title=f"{key}: {WORKLOADS[key].title}")
    for column in ("us a step", "quartiles", "cpu us", "times as fast", "as NumPyro"):
        table.add_column(column, justify="right")
    for result in results:
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
        )
    console.print(table)
    if base is not None:
        console.print(
            f"times as fast: as '{base.title}'; as NumPyro: as its jit(svi.update); cpu us: "
            "processor time of all threads a step"
        )


Rows = tuple[list[str], list[list[str]]]


def _grid(entries: list[Any], cell: Any, head: str) -> Rows:
    """Methods down, workloads across."""
    found = by_workload(entries)
    titles = {e.method: e.title for es in found.values() for e in es if e.missing is None}
    rows = []
    for method, title in titles.items():
        at = [next((e for e in es if e.method == method), None) for es in found.values()]
        cells = ["-" if e is None or e.missing else "failed" if e.failure else cell(e) for e in at]
        rows.append([title, *cells])
    return [head, *found], rows


def _steps(results: list[Result]) -> Rows:
    bases = {key: baseline(rs) for key, rs in by_workload(results).items()}

    def cell(result: Result) -> str:
        text, base = number(result.microseconds), bases[result.workload]
        if base is None:
            return text
        return f"**{text}**" if result is base else f"{text} ({_ratio(result, base)})"

    return _grid(results, cell, "us a step (times as fast as the figure in bold)")


def _starts(entries: list[Any]) -> Rows:
    def cell(entry: Any) -> str:
        return f"{entry.cold:.1f} / {entry.warm:.1f}"

    return _grid(entries, cell, "seconds to the third step, cold / warm")


def _answers(entries: list[Any]) -> Rows:
    def cell(answer: Any) -> str:
        if answer.reached:
            return f"{number(answer.seconds)} ({answer.steps:,} steps)"
        return f"not in {answer.seconds:.0f} s ({number(answer.distance)} sd off)"

    return _grid(entries, cell, "seconds to all means within 0.1 sd")


def _flat(results: list[Result]) -> Rows:
    sizes = sorted({result.rows for result in results})
    titles = {r.method: r.title for r in results if r.measured}
    rows = []
    for method, title in titles.items():
        cells = [
            next((r for r in results if r.rows == size and r.method == method and r.measured), None)
            for size in sizes
        ]
        rows.append([title, *("-" if r is None else number(r.microseconds) for r in cells)])
    return ["us a step of W4 at N", *(f"{size:,}" for size in sizes)], rows


def _busy(entries: list[Any]) -> Rows:
    return _grid(entries, lambda entry: f"{entry.share:.0%}", "share of time that the GPU is busy")


OTHERS = {"starts": _starts, "answers": _answers, "flat": _flat, "busy": _busy}


def markdown(about: dict[str, Any], found: Found) -> str:
    """Tables of all that was measured."""
    lines = []
    for kind, make in {"steps": _steps, **OTHERS}.items():
        header, rows = make(found.get(kind, []))
        if rows:
            lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
            lines.append("")
    return "\n".join([*lines, heading(about)])


def put_into(path: Path, tables: str) -> None:
    """Replace what stands between the two marks of a document."""
    before, begin, rest = path.read_text().partition("<!-- benchmarks.speed -->")
    _, end, after = rest.partition("<!-- end -->")
    if not begin or not end:
        raise ValueError(f"{path} has no marks <!-- benchmarks.speed --> and <!-- end -->")
    path.write_text(f"{before}{begin}\n{tables}\n{end}{after}")
