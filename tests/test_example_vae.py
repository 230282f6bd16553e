"""Pyro's VAE example: images of bars, a decoder in the model, an encoder as amortised guide."""

import math

import pyro
import pyro.distributions as dist
import torch
from example_support import BatchPlate, assert_same_steps, fit
from torch import nn

SIDE, LATENT, FLIP = 5, 3, 0.05


def bars(count, seed):
    """Images with one row of pixels on, all equally likely; each pixel flips at times."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(SIDE, (count,), generator=generator)
    images = torch.zeros(count, SIDE, SIDE)
    images[torch.arange(count), which] = 1.0
    flips = torch.rand(images.shape, generator=generator) < FLIP
    return (images - flips.float()).abs().flatten(1)


class VAE(nn.Module):
    """The example's two networks; model and guide are methods that register one each."""

    def __init__(self, plate):
        super().__init__()
        self.plate = plate
        pixels = SIDE * SIDE
        self.decoder = nn.Sequential(nn.Linear(LATENT, 32), nn.Softplus(), nn.Linear(32, pixels))
        self.encoder = nn.Sequential(
            nn.Linear(pixels, 32), nn.Softplus(), nn.Linear(32, 2 * LATENT)
        )

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with self.plate(x):
            loc, log_scale = self.encoder(x).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def make(plate):
    torch.manual_seed(0)
    vae = VAE(plate)
    return vae.model, vae.guide


def test_same_steps_as_pyro():
    assert_same_steps(make, bars(40, seed=0))


def test_held_out_elbo_is_between_independent_pixels_and_the_truth():
    train, test = bars(1000, seed=1), bars(1000, seed=2)
    svi = fit(*make(BatchPlate()), train, batch_size=100, epochs=60, lr=0.01)
    with torch.no_grad():
        torch.manual_seed(0)
        elbo = -float(svi.loss(test)) / svi.dataset_size
    # The best model without a latent has independent pixels, each at its frequency.
    independent = float(dist.Bernoulli(train.mean(0)).to_event(1).log_prob(test).mean())
    # What no model can beat but by chance: the images' own log-probability, by the sum over bars.
    clean = torch.eye(SIDE).repeat_interleave(SIDE, dim=1)
    each = dist.Bernoulli(clean * (1 - 2 * FLIP) + FLIP).to_event(1)
    truth = float((each.log_prob(test[:, None]) - math.log(SIDE)).logsumexp(-1).mean())
    # -13.6 < elbo < -6.7; the fit reaches -8.3 to -8.5 with six seeds.
    assert independent + 4 < elbo < truth
