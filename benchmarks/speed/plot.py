"""Results as a figure: a panel of each workload, a dot of each method."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is written; there may be no screen
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from benchmarks.speed.results import by_workload
from benchmarks.speed.rounds import Result
from benchmarks.speed.workloads import WORKLOADS

COLOURS = {"ours": "#1f5fa8", "numpyro": "#5a8f3c"}
OTHERS = "#c2571a"


def draw(path: Path, results: Iterable[Result]) -> None:
    """Draw microseconds a step, on a logarithmic axis, with the range over rounds."""
    found = by_workload(result for result in results if result.measured)
    titles = list({r.method: r.title for rs in found.values() for r in rs}.items())[::-1]
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(3 + 2.1 * len(found), 1.1 + 0.3 * len(titles)),
        sharey=True,
        squeeze=False,
    )
    for axis, (key, measured) in zip(axes[0], found.items(), strict=True):
        for result in measured:
            at = [method for method, _ in titles].index(result.method)
            colour = COLOURS.get(result.method.split("-")[0], OTHERS)
            times = [chunk.microseconds for chunk in result.chunks]
            axis.plot([min(times), max(times)], [at, at], color=colour, lw=1.5, alpha=0.6)
            axis.plot(result.microseconds, at, "o", color=colour, ms=5)
        work = WORKLOADS[key]
        axis.set(xscale="log", xlabel="us a step")
        # Few labels, so that those of a short axis do not run into each other.
        axis.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0), numticks=6))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(textwrap.fill(f"{key}: {work.title}", 26), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="x", labelrotation=45)
        axis.grid(alpha=0.25)
        axis.set_yticks(range(len(titles)), [title for _, title in titles], fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    # It has few colours: a palette is a third of the size.
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
