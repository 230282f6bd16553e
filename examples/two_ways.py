"""Two ways to train on mini-batches, and the one that goes wrong: posteriors, rows, memory.

    python examples/two_ways.py --output out

- `plate`: `pyro.plate("data", N, subsample_size=B)` in the model, all data in memory;
- `loader`: pyro_lightning, whose DataLoader feeds B rows of a file;
- `no scale`: the same DataLoader with plain Pyro, where nothing multiplies by N/B.

Each trains a linear regression, whose exact posterior is known, and a small Bayesian neural
network. Every run has a process of its own, so that its memory is its own.
"""

import argparse
import logging
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, islice, repeat
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Trainer, seed_everything
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import ClippedAdam
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR as Decay

from pyro_lightning import ArrayDataModule, PyroSVIModule

COLUMNS, PRIOR_SD, FIRST, LAST = 64, 0.1, 0.02, 1e-4
TRUE = np.linspace(-0.3, 0.3, COLUMNS, dtype=np.float32)
GRID = (torch.arange(-20, 21) / 10)[:, None].expand(-1, COLUMNS)
WAYS, NOISE = ("plate", "loader", "no scale"), {"linear": 1.0, "network": 0.5}


class Linear(PyroModule):
    def __init__(self):
        super().__init__()
        self.w = PyroSample(dist.Normal(0.0, PRIOR_SD).expand([COLUMNS]).to_event(1))

    def forward(self, x):
        return x @ self.w


class Network(PyroModule):
    def __init__(self, hidden=8):
        super().__init__()
        self.inner, self.outer = PyroModule[nn.Linear](1, hidden), PyroModule[nn.Linear](hidden, 1)
        for layer in (self.inner, self.outer):
            for name, value in list(layer.named_parameters()):
                prior = dist.Normal(0.0, 1.0).expand(value.shape).to_event(value.dim())
                setattr(layer, name, PyroSample(prior))

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x[:, :1])))[:, 0]


def anonymous_mb():
    """Memory of this process that no file backs (Linux)."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def run_one(folder, way, kind, size, steps, seed):
    """Train one model one way, in a process of its own; return what is shown of it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    seed_everything(seed, verbose=False)
    torch.set_num_threads(1)
    net, noise = Linear() if kind == "linear" else Network(), NOISE[kind]
    x, y = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("x", kind))
    rows, seen, gamma = len(x), [], (LAST / FIRST) ** (1 / steps)
    memory = [anonymous_mb()]

    def by_rows(x, y):
        memory.append(anonymous_mb())
        mean = net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    def in_model(x, y):
        plate = pyro.plate("data", rows, subsample_size=size)
        memory.append(anonymous_mb())
        seen.extend(plate.indices.tolist() if len(seen) < rows else ())
        mean = net(x[plate.indices])
        with plate:
            pyro.sample("y", dist.Normal(mean, noise), obs=y[plate.indices])

    data, draws = ArrayDataModule((x, y), batch_size=size), []
    if way == "loader":
        svi = PyroSVIModule(
            by_rows,
            partial(AutoNormal, init_scale=0.005),
            optimizer=partial(torch.optim.Adam, lr=FIRST),
            lr_scheduler=lambda adam: {"scheduler": Decay(adam, gamma), "interval": "step"},
        )
        Trainer(max_steps=steps, accelerator="cpu", barebones=True).fit(svi, datamodule=data)
        samples = svi.posterior_samples(500)
        draws = [{name: value[i] for name, value in samples.items()} for i in range(500)]
    else:
        loader, model = data.train_dataloader(), by_rows
        batches = chain.from_iterable(repeat(loader))
        if way == "plate":
            model, batches = in_model, repeat([torch.tensor(np.array(part)) for part in (x, y)])
        guide = AutoNormal(model, init_scale=0.005)
        adam = ClippedAdam({"lr": FIRST, "lrd": gamma, "clip_norm": 1e9})
        plain = SVI(model, guide, adam, Trace_ELBO())
        for batch in islice(batches, steps):
            plain.step(*batch)
        draws = [guide(*batch) for _ in range(500)]
    peak = max(memory) - memory[0]
    order = seen[:rows] if way == "plate" else list(data.train_dataloader().sampler)
    # A draw of the weights gives a draw of the whole curve.
    curves = [poutine.condition(net, data=draw)(GRID) for draw in draws]
    values = torch.stack([draw["w"] for draw in draws] if kind == "linear" else curves).detach()
    return values.mean(0).numpy(), values.std(0).numpy(), len(set(order)) / rows, peak


def write_data(folder, rows):
    """Write the data, and return the exact posterior of the linear model."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, COLUMNS), np.float32)
    errors = rng.standard_normal((2, rows), np.float32)
    y = x @ TRUE + errors[0]
    for name, array in (("x", x), ("linear", y), ("network", np.sin(2 * x[:, 0]) + errors[1] / 2)):
        np.save(folder / f"{name}.npy", array)
    covariance = np.linalg.inv(x.T.astype(float) @ x + np.eye(COLUMNS) / PRIOR_SD**2)
    return covariance @ (x.T.astype(float) @ y), np.sqrt(np.diag(covariance))


def tables(exact, found, rows):
    """Both posteriors of some coefficients and of the curve at some x; what each way took."""
    beside = Table("mean ± sd", "exact or true", *WAYS, title="Posteriors side by side")
    pieces = [(f"coefficient {i + 1}", "linear", i) for i in range(0, COLUMNS, 15)]
    pieces += [(f"curve at x = {GRID[i, 0]:g}", "network", i) for i in range(0, len(GRID), 10)]
    for name, kind, i in pieces:
        linear = kind == "linear"
        pairs = [exact] * linear + [found[way, kind] for way in WAYS]
        cells = [f"{mean[i]:.4f} ± {sd[i]:.4f}" for mean, sd, *_ in pairs]
        cells = cells if linear else [f"{torch.sin(2 * GRID[i, 0]):.4f}", *cells]
        beside.add_row(f"{kind}: {name}", *cells)
    headings = ("way", "off by, in exact sds", "sd / exact sd", "sd of the network's curve")
    summary = Table(*headings, "rows seen an epoch", "memory", title=f"N = {rows:,}")
    for way in WAYS:
        (mean, sd, share, memory), (_, spread, *_) = found[way, "linear"], found[way, "network"]
        off, ratio = np.abs(mean - exact[0]).mean() / exact[1].mean(), (sd / exact[1]).mean()
        cells = (f"{off:.2f}", f"{ratio:.2f}", f"{spread.mean():.4f}", f"{share:.0%}")
        summary.add_row(way, *cells, f"{memory:.0f} MB")
    return beside, summary


def draw(exact, found, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    x, some = GRID[:, 0].numpy(), slice(2, None, 5)  # bars of all would cover each other
    bars = dict(fmt="o", ms=3)
    left.errorbar(TRUE[some] - 0.012, 0 * TRUE[some], 2 * exact[1][some], color="k", **bars)
    for i, (way, colour) in enumerate(zip(WAYS, ("tab:blue", "tab:green", "tab:red"), strict=True)):
        (mean, sd, *_), (curve, spread, *_) = found[way, "linear"], found[way, "network"]
        at = TRUE[some] + 0.008 * i - 0.004
        left.errorbar(at, (mean - exact[0])[some], 2 * sd[some], color=colour, **bars)
        # The widest band lies below the others.
        band = dict(color=colour, alpha=0.3, zorder=-i)
        right.fill_between(x, curve - 2 * spread, curve + 2 * spread, **band)
        right.plot(x, curve, color=colour, lw=1, label=way)
    right.plot(x, np.sin(2 * x), "k--", lw=1, label="exact (left), truth (right)")
    left.set(title="Linear: posterior minus the exact mean, 2 sd")
    left.set(xlabel="true coefficient (every fifth is shown)")
    right.set(title="Network: posterior of the curve, 2 sd", xlabel="x")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="N")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of each run")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    runs, size = [(way, kind) for kind in NOISE for way in WAYS], min(1024, args.rows // 4)
    with tempfile.TemporaryDirectory() as name:
        exact = write_data(Path(name), args.rows)
        with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
            jobs = [pool.submit(run_one, Path(name), *r, size, args.steps, args.seed) for r in runs]
            found = dict(zip(runs, (job.result() for job in jobs), strict=True))
    for table in tables(exact, found, args.rows):
        Console(width=112).print(table)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(exact, found, args.output / "two_ways.png")


if __name__ == "__main__":
    main()
