"""Time of a training step: this package, plain Pyro, Pyro's Lightning example and NumPyro.

``python -m benchmarks.speed``, from the root of a checkout, trains five models in all these ways,
in turn, prints tables, and writes ``steps.json`` and ``steps.png``.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.speed import machine, report, results
from benchmarks.speed.methods import METHODS
from benchmarks.speed.rounds import Settings, measure
from benchmarks.speed.workers import context, set_environment
from benchmarks.speed.workloads import WORKLOADS

# Small enough to run among the examples; the figures mean nothing.
SMOKE = {"rounds": 2, "seconds": 0.02, "warmup": 0.0, "rows": 600, "batch_size": 200}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a method in a round")
    parser.add_argument("--warmup", type=float, default=2.0, help="seconds of steps not counted")
    parser.add_argument("--threads", type=int, default=1, help="threads of each library")
    parser.add_argument("--rows", type=int, help="at most so many rows; each workload's N else")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown too")
    parser.add_argument("--read", type=Path, help="show these results; measure nothing")
    return parser.parse_args()


def main() -> int:
    args = parse()
    console = Console(width=130)
    if args.read is not None:
        about, found = results.read(args.read)
    else:
        settings = Settings(args.rounds, args.seconds, args.warmup, args.threads, args.rows)
        if args.smoke:
            settings = Settings(**SMOKE)
        set_environment(settings.threads, settings.device)
        about = {**machine.describe(), "settings": vars(settings)}
        ctx, found = context(), []
        for key in args.workloads:
            found += measure(ctx, key, [METHODS[m] for m in args.methods], settings)
            results.write(args.output / "steps.json", about, found)
    report.show(console, about, found)
    if args.markdown:
        print(report.markdown(about, found))
    from benchmarks.speed import plot

    plot.draw(args.output / "steps.png", about, found)
    return int(any(result.failure is not None for result in found))


if __name__ == "__main__":
    sys.exit(main())
