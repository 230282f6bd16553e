"""Two ways to train on mini-batches, and the one that goes wrong: posteriors, rows, memory.

- `plate`: `pyro.plate("data", N, subsample_size=B)` in the model, all data in memory;
- `loader`: pyro_lightning, whose DataLoader feeds B rows of a file;
- `no scale`: the same DataLoader with plain Pyro, where nothing multiplies by N/B.

Each trains a linear regression, whose exact posterior is known, and a small Bayesian network.
"""

import argparse
import logging
import tempfile
import warnings
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
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim.clipped_adam import ClippedAdam

from pyro_lightning import ArrayDataModule, PyroSVIModule

COLUMNS, PRIOR_SD, FIRST, LAST = 64, 0.1, 0.02, 1e-4
TRUE = np.linspace(-0.3, 0.3, COLUMNS, dtype=np.float32)
GRID = (torch.arange(-20, 21) / 10)[:, None].expand(-1, COLUMNS)
WAYS = ("plate", "loader", "no scale")


def linear(x):
    return x @ pyro.sample("w", dist.Normal(0.0, PRIOR_SD).expand([COLUMNS]).to_event(1))


def network(x):
    inner, bias, outer = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3, 8]).to_event(2))
    return torch.tanh(x[:, :1] * inner + bias) @ outer


# Function, noise, and where its posterior is shown: at unit vectors that is each coefficient.
KINDS = {"linear": (linear, 1.0, torch.eye(COLUMNS)), "network": (network, 0.5, GRID)}


def anonymous_mb():
    """Memory of this process that no file backs (Linux)."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def run_one(folder, way, kind, size, steps):
    """Train one model one way, in a process of its own, so that its memory is its own."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    function, noise, shown_at = KINDS[kind]
    x, y = (np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("x", kind))
    rows, seen, memory = len(x), [], [anonymous_mb()]

    def model(x, y):
        plate = pyro.plate("data", len(x), subsample_size=size if way == "plate" else None)
        memory.append(anonymous_mb())
        seen.extend(plate.indices.tolist() if way == "plate" and len(seen) < rows else ())
        mean = function(x[plate.indices])
        with plate:
            pyro.sample("y", dist.Normal(mean, noise), obs=y[plate.indices])

    guide = AutoNormal(model, init_scale=0.005)
    adam = dict(lr=FIRST, lrd=(LAST / FIRST) ** (1 / steps), clip_norm=1e9)
    data = ArrayDataModule((x, y), batch_size=size)
    loader = data.train_dataloader()
    if way == "loader":
        svi = PyroSVIModule(model, guide, optimizer=partial(ClippedAdam, **adam))
        Trainer(max_steps=steps, accelerator="cpu", barebones=True).fit(svi, datamodule=data)
    else:
        whole = [torch.tensor(np.array(part)) for part in (x, y)] if way == "plate" else None
        batches = repeat(whole) if whole else chain.from_iterable(repeat(loader))
        svi = SVI(model, guide, pyro.optim.ClippedAdam(adam), Trace_ELBO())
        for batch in islice(batches, steps):
            svi.step(*batch)
    share = len(set(seen[:rows] or loader.sampler)) / rows
    draws = [pyro.condition(function, data=guide())(shown_at) for _ in range(500)]
    values = torch.stack(draws).detach()
    return values.mean(0).numpy(), values.std(0).numpy(), share, max(memory) - memory[0]


def write_data(folder, rows):
    """Write the data, and return the exact posterior of the linear model, and the true curve."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, COLUMNS), np.float32)
    errors = rng.standard_normal((2, rows), np.float32)
    y = x @ TRUE + errors[0]
    for name, array in (("x", x), ("linear", y), ("network", np.sin(2 * x[:, 0]) + errors[1] / 2)):
        np.save(folder / f"{name}.npy", array)
    covariance = np.linalg.inv(x.T.astype(float) @ x + np.eye(COLUMNS) / PRIOR_SD**2)
    exact = covariance @ (x.T.astype(float) @ y), np.sqrt(np.diag(covariance))
    return {("exact", "linear"): exact, ("exact", "network"): (np.sin(2 * GRID[:, 0].numpy()), 0)}


def draw(found, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    x, some = GRID[:, 0].numpy(), slice(2, None, 5)  # bars of all would cover each other
    colours = ("black", "tab:blue", "tab:green", "tab:red")
    for i, (way, colour) in enumerate(zip(("exact", *WAYS), colours, strict=True)):
        mean, sd = found[way, "linear"][:2]
        at, off = TRUE + 0.008 * i - 0.012, mean - found["exact", "linear"][0]
        left.errorbar(at[some], off[some], 2 * sd[some], color=colour, fmt="o", ms=3)
        mean, sd = found[way, "network"][:2]
        right.plot(x, mean, "--" if way == "exact" else "-", color=colour, lw=1, label=way)
        # The widest band lies below the others.
        right.fill_between(x, mean - 2 * sd, mean + 2 * sd, color=colour, alpha=0.3, zorder=-i)
    left.set(title="Linear: posterior minus the exact mean, 2 sd")
    left.set(xlabel="true coefficient (every fifth is shown)")
    right.set(title="Network: posterior of the curve, 2 sd; truth in black", xlabel="x")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="N")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of each run")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    args = parser.parse_args()
    runs, size = [(way, kind) for kind in KINDS for way in WAYS], min(1024, args.rows // 4)
    with tempfile.TemporaryDirectory() as name:
        found = write_data(Path(name), args.rows)
        jobs = [(Path(name), *run, size, args.steps) for run in runs]
        with get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
            found.update(zip(runs, pool.starmap(run_one, jobs, chunksize=1), strict=True))
    args.output.mkdir(parents=True, exist_ok=True)
    draw(found, args.output / "two_ways.png")
    (exact, exact_sd), off, ratio = found["exact", "linear"], {}, {}
    print("linear     off by, exact sds   sd / exact sd   rows seen an epoch   memory")
    for way in WAYS:
        mean, sd, share, memory = found[way, "linear"]
        off[way], ratio[way] = np.abs(mean - exact).mean() / exact_sd.mean(), (sd / exact_sd).mean()
        print(f"{way:9s}{off[way]:19.2f}{ratio[way]:16.2f}{share:21.0%}{memory:6.0f} MB")
    agree = all(off[way] < 0.5 and 0.75 < ratio[way] < 1.25 for way in ("plate", "loader"))
    print("Verdict:", "plate and loader agree." if agree else "they DIFFER; train longer.")


if __name__ == "__main__":
    main()
