"""Time of a training step: this package, plain Pyro, Pyro's Lightning example and NumPyro.

``python -m benchmarks.speed``, from the root of a checkout, trains five models in all these ways,
in turn, prints tables, and writes ``speed.json`` and ``speed.png``. Besides the ``steps`` there
are: ``starts``, seconds to the first compiled steps, cold and warm; ``answers``, seconds to the
full-data posterior; ``flat``, a step of the model with a latent for every row as N grows; ``busy``,
the share of time that a GPU computes. ``all`` measures each, ``busy`` on a GPU only.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.speed import machine, plot, report, results
from benchmarks.speed.answer import EPOCHS_A_TENTH, answers
from benchmarks.speed.busy import busy
from benchmarks.speed.methods import METHODS
from benchmarks.speed.rounds import Settings, measure
from benchmarks.speed.starts import starts
from benchmarks.speed.workers import context, set_environment
from benchmarks.speed.workloads import WORKLOADS

KINDS = ("steps", "starts", "answers", "flat", "busy")
STEPS = (
    *("raw", "example", "ours", "ours-k32", "ours-compile", "ours-compile-k32"),
    *("ours-compile-k128", "ours-graphs", "ours-graphs-k32"),
    *("numpyro", "numpyro-scan", "numpyro-scan-host"),
)
COMPILED = ("ours-compile", "ours-compile-k32", "numpyro", "numpyro-scan")
FLAT = ("raw", "ours", "ours-compile", "ours-compile-k32")
# Small enough to run among the examples; the figures mean nothing.
SMOKE: dict[str, Any] = {
    "rounds": 2,
    "seconds": 0.02,
    "warmup": 0.0,
    "rows": 600,
    "batch_size": 200,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", default=["steps"], help=f"all, {', '.join(KINDS)}")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="a choice for each kind else")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a method in a round")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds of steps not counted")
    parser.add_argument("--threads", type=int, default=1, help="threads of each library")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, help="at most so many rows; each workload's N else")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds to the answer at most")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[10**5, 10**6, 10**7], help="N of 'flat'"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument(
        "--readme", type=Path, help="put tables between the marks there, and docs/speed.png beside"
    )
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown too")
    parser.add_argument(
        "--read", type=Path, nargs="+", help="join and show these results; measure nothing"
    )
    args = parser.parse_args()
    unknown = set(args.kinds) - {"all", *KINDS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: all, {', '.join(KINDS)}")
    if "all" in args.kinds:
        args.kinds = [kind for kind in KINDS if kind != "busy" or args.device == "cuda"]
    return args


def run(args: argparse.Namespace, settings: Settings, path: Path) -> tuple[Any, results.Found]:
    """Measure; whatever is done is on disk, should the rest be interrupted."""
    set_environment(settings.threads, settings.device)
    about = {**machine.describe(settings.device), "settings": vars(settings)}
    ctx, found = context(), {}
    began = time.perf_counter()

    def methods(default):
        return [METHODS[key] for key in args.methods or default]

    def note(kind: str, entries: list[Any]) -> None:
        found.setdefault(kind, []).extend(entries)
        results.write(path, about, found)
        done = f"{kind}: {entries[0].workload} done after" if entries else f"{kind}: nothing,"
        print(f"{done} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    for kind in args.kinds:
        if kind == "flat":
            size = settings.batch_size or WORKLOADS["W4"].batch_size
            for rows in [600] if args.smoke else args.sizes:
                rows = -(-rows // size) * size  # whole batches
                note(kind, measure(ctx, "W4", methods(FLAT), settings, rows))
            continue
        for key in args.workloads:
            if kind == "steps":
                note(kind, measure(ctx, key, methods(STEPS), settings))
            elif kind == "starts":
                note(kind, starts(ctx, key, methods(COMPILED), settings))
            elif kind == "busy":
                note(kind, busy(ctx, key, methods(STEPS), settings))
            elif key in EPOCHS_A_TENTH:
                note(kind, answers(ctx, key, methods(STEPS), settings, args.limit))
    return about, found


def main() -> int:
    args = parse()
    path = args.output / "speed.json"
    if args.read is not None:
        about, found = results.read(args.read)
        results.write(path, about, found)
    else:
        settings = Settings(
            args.rounds, args.seconds, args.warmup, args.threads, args.rows, device=args.device
        )
        if args.smoke:
            settings, args.limit = Settings(**SMOKE), 1.0
        about, found = run(args, settings, path)
    report.show(Console(width=130), about, found)
    if args.markdown:
        print(report.markdown(about, found))
    if args.readme is not None:
        report.put_into(args.readme, report.markdown(about, found))
    if found.get("steps"):
        plot.draw(args.output / "speed.png", found["steps"])
        if args.readme is not None:
            plot.draw(args.readme.parent / "docs" / "speed.png", found["steps"])
    return int(any(entry.failure is not None for entries in found.values() for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
