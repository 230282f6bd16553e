"""A variational autoencoder of 1,797 handwritten digits: all latents are local.

    python examples/vae.py --output out

Each digit has a latent of its own, whose posterior an encoder computes from its pixels. There is
nothing global but parameters, so that N/B only rescales the loss: what is reported is the ELBO of
one digit. With a linear decoder the model is probabilistic PCA, whose maximum likelihood has a
closed form (Tipping and Bishop 1999, in scikit-learn's ``PCA.score``), and the ELBO of a linear
encoder reaches it (Lucas et al. 2019). That is the check; then a network decodes, and does better.
"""

import argparse
import logging
import math
import warnings
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from pyro.infer import TraceMeanField_ELBO
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import nn
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import OneCycleLR

from pyro_lightning import ArrayDataModule, PyroSVIModule

PIXELS = 64


def network(inputs, outputs, hidden):
    """A linear map, or one hidden layer."""
    if not hidden:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


class VAE(PyroSVIModule):
    def __init__(self, latents, hidden, mean, **options):
        super().__init__(elbo=TraceMeanField_ELBO(), **options)  # the KL in closed form
        self.latents = latents
        self.decoder = network(latents, PIXELS, hidden)
        self.encoder = network(PIXELS, 2 * latents, hidden)
        self.noise = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("mean", mean)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latents]).to_event(1))
            image = self.mean + self.decoder(z)
            pyro.sample("x", dist.Normal(image, softplus(self.noise)).to_event(1), obs=x)

    def encode(self, x):
        loc, scale = self.encoder(x - self.mean).chunk(2, -1)
        return loc, softplus(scale - 2.0)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.encode(x)).to_event(1))


class Curves(Callback):
    def __init__(self):
        self.elbos = []

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.elbos.append(-float(trainer.callback_metrics["val_loss_per_obs"]))


def fit(train, test, latents, hidden, args):
    """Train one of the two; returns it and its ELBO per held-out digit by epoch."""
    data = ArrayDataModule(train, args.batch_size, val=test)
    steps = args.epochs * math.ceil(len(train) / args.batch_size)
    svi = VAE(
        latents,
        hidden,
        train.mean(0),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        lr_scheduler=lambda adam: {
            "scheduler": OneCycleLR(adam, 0.01, total_steps=steps),
            "interval": "step",
        },
    )
    curves = Curves()
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", callbacks=[curves], **quiet)
    trainer.fit(svi, datamodule=data)
    with torch.no_grad():  # the noise of the latents is averaged
        elbos = [-svi.loss(test) / svi.dataset_size for _ in range(200)]
    return svi, float(torch.stack(elbos).mean()), curves.elbos


def draw(path, found, images, digits, exact):
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    with torch.no_grad():
        z = found["network"][0].encode(images)[0]
    dots = left.scatter(*z[:, :2].T, c=digits, cmap="tab10", s=9, vmin=-0.5, vmax=9.5)
    figure.colorbar(dots, ax=left, ticks=range(10), label="digit")
    left.set(title="Means of the first two latents, held-out digits", xlabel="$z_1$")
    left.set(ylabel="$z_2$")
    for name, (_, _, elbos) in found.items():
        right.plot(range(1, len(elbos) + 1), elbos, label=f"ELBO, {name} decoder")
    right.axhline(exact, color="grey", ls="--", label="log-likelihood of PCA, closed form")
    right.set(title="A held-out digit, while training", xlabel="epoch", ylabel="nats")
    right.set_ylim(bottom=exact - 20)
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128, help="units of the network's layers")
    parser.add_argument("--batch-size", type=int, default=128, help="B")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seed_everything(args.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # advice
    torch.set_num_threads(1)
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(images)).numpy()
    images, digits = torch.tensor(images[order] / 4.0, dtype=torch.float32), digits[order]
    test, train = images[:300], images[300:]
    found = {
        "linear": fit(train, test, args.latents, 0, args),
        "network": fit(train, test, args.latents, args.hidden, args),
    }
    exact = PCA(args.latents).fit(train.numpy()).score(test.numpy())
    args.output.mkdir(parents=True, exist_ok=True)
    draw(args.output / "vae.png", found, test, digits[:300], exact)
    linear, better = found["linear"][1], found["network"][1]
    print(f"ELBO of a held-out digit, linear decoder: {linear:.2f} nats")
    print(f"log-likelihood of probabilistic PCA, scikit-learn: {exact:.2f} nats")
    print(f"ELBO of a held-out digit, network: {better:.2f} nats, {better - exact:+.2f}")
    agree = abs(linear - exact) < 0.5 and better > exact
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer.")


if __name__ == "__main__":
    main()
