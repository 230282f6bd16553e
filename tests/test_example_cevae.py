"""Pyro's causal effect VAE, as Pyro ships it: its model, its guide and its own ELBO."""

import pyro
import pytest
import torch
from example_support import assert_same_steps, fit
from pyro.contrib.cevae import CEVAE, PreWhitener, TraceCausalEffect_ELBO
from pyro.nn import PyroModule

FEATURES = 5
EFFECT = 0.3


def patients(count, seed):
    """A hidden binary confounder, noisy views of it, treatment and outcome that depend on it."""
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.rand(count, generator=generator) < 0.5).float()
    x = 2 * hidden[:, None] + torch.randn(count, FEATURES, generator=generator)
    treated = (torch.rand(count, generator=generator) < 0.2 + 0.6 * hidden).float()
    chance = 0.1 + 0.5 * hidden + EFFECT * treated
    outcome = (torch.rand(count, generator=generator) < chance).float()
    return x, treated, outcome


class Named(PyroModule):
    """A part of Pyro's CEVAE under a name of its own, its data plate told its size or not.

    Pyro's class gives networks of model and guide the same names (``t_nn``, ``y0_nn``, ``y1_nn``).
    Raw Pyro trains only the first of a name, which leaves the model's at their start.
    """

    def __init__(self, name, part, plate):
        super().__init__()
        setattr(self, name, part)
        self.name, self.plate = name, plate

    def forward(self, x, t, y):
        return getattr(self, self.name)(x, t, y, size=getattr(self.plate, "size", None))


def make(plate):
    torch.manual_seed(0)
    cevae = CEVAE(FEATURES, latent_dim=2, hidden_dim=16, num_layers=2)
    return Named("generative", cevae.model, plate), Named("inference", cevae.guide, plate)


def test_same_steps_as_pyro():
    assert_same_steps(make, patients(30, seed=0), elbo=TraceCausalEffect_ELBO())


def test_networks_of_one_name_in_model_and_guide_both_train():
    torch.manual_seed(0)
    cevae = CEVAE(FEATURES, latent_dim=2, hidden_dim=16, num_layers=2)
    before = {name: p.detach().clone() for name, p in cevae.named_parameters()}
    data = patients(100, seed=0)
    elbo = TraceCausalEffect_ELBO()
    fit(cevae.model, cevae.guide, data, batch_size=50, epochs=1, lr=0.01, elbo=elbo)
    assert all((p != before[name]).any() for name, p in cevae.named_parameters())


def test_average_treatment_effect():
    x, treated, outcome = patients(2000, seed=1)
    torch.manual_seed(0)
    cevae = CEVAE(FEATURES, latent_dim=2, hidden_dim=32, num_layers=2)
    cevae.whiten = PreWhitener(x)
    data = cevae.whiten(x), treated, outcome
    elbo = TraceCausalEffect_ELBO()
    fit(cevae.model, cevae.guide, data, batch_size=100, epochs=30, lr=0.01, elbo=elbo)
    with pyro.get_param_store().scope():  # Pyro's own estimate, which uses its store
        torch.manual_seed(0)
        effect = float(cevae.ite(patients(500, seed=2)[0], num_samples=50).mean())
    # 0.30 to 0.34 with five seeds. Were the confounder seen, 2000 patients would leave a sampling
    # error of 0.026: half of them have each value, a fifth of those are the rarer treatment, and
    # outcomes vary by 0.24 among these and 0.09 among the others. The tolerance is three of it.
    assert effect == pytest.approx(EFFECT, abs=0.08)
    # What the confounder makes of it without care is far off.
    naive = float(outcome[treated == 1].mean() - outcome[treated == 0].mean())
    assert naive > EFFECT + 0.25
