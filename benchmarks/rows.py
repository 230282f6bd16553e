"""Time of a training step of a model with a latent of each row, against the number of rows N.

The model is a random effect: mu -> z_i -> x_i, under AutoNormal, which keeps two parameters of each
row. A step holds B rows and should cost O(B). All sizes are timed in turn, round by round, so that
a machine that slows down slows all of them; shown are medians, and their ratio to the smallest N.
"""

import argparse
import time
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table

from pyro_lightning import IndexedBatch, PyroSVIModule


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


class Run:
    """A module of N rows, and its steps."""

    def __init__(self, rows, batch_size):
        self.rows, self.size = rows, batch_size
        self.svi = PyroSVIModule(
            model, optimizer=partial(torch.optim.Adam, lr=1e-2), dataset_size=rows
        )
        self.x = torch.randn(rows)
        self.svi.loss(self.batch())
        self.optimizer = self.svi.configure_optimizers()
        self.step()  # makes the optimizer's state

    def batch(self):
        rows = torch.randint(self.rows, (self.size,))
        return IndexedBatch(self.x[rows], rows)

    def step(self):
        self.optimizer.zero_grad()
        self.svi.loss(self.batch()).backward()
        self.optimizer.step()

    def microseconds(self, steps):
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return 1e6 * (time.perf_counter() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="steps of a size in a round")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    runs = [Run(rows, args.batch_size) for rows in args.rows]
    times = [[run.microseconds(args.steps) for run in runs] for _ in range(args.rounds)]
    median = torch.tensor(times).median(0).values
    table = Table("N", "us a step", "ratio", title=f"B = {args.batch_size}, AutoNormal, RowAdam")
    for run, value in zip(runs, median, strict=True):
        table.add_row(f"{run.rows:,}", f"{value:.0f}", f"{value / median[0]:.2f}")
    Console(width=60).print(table)


if __name__ == "__main__":
    main()
