"""Sites of model and guide that do not belong together are refused; what does, passes.

Losses of what passes are compared with closed forms by hand, or with Pyro's own plate.
"""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from check_support import (
    B,
    N,
    X,
    log_normal,
    loss_of,
    refused,
    validation,  # noqa: F401
)
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from support import normal_mean

from pyro_lightning import PyroSVIModule

# Pyro itself only warns of these, and only with its validation on.
pytestmark = pytest.mark.filterwarnings("ignore:Found .*vars in")


def point(name, value=0.0):
    """A site without entropy, at a parameter."""
    return pyro.sample(name, dist.Delta(pyro.param(f"{name}_at", torch.tensor(value))))


def mean():
    """Something that trains, at 0."""
    return pyro.param("mean", torch.tensor(0.0))


def observe(loc, x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


# -- a latent without guide ------------------------------------------------------------------------


def two_latents(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    shift = pyro.sample("shift", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    observe(mu + shift.sum(), x)


def two_observed(x, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize("fields", [("x",), ("x", "z")])
def test_what_a_later_batch_lacks_is_no_latent_without_guide(fields):
    def model(x, y=None, z=None):
        two_observed(x, y)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss({"x": X, "y": X})
    with pytest.raises(ValueError, match="latent site 'y' .* has no site in the guide"):
        svi.loss(dict.fromkeys(fields, X))


def test_what_a_later_batch_lacks_may_be_drawn_by_the_guide():
    def guide(x, y=None):
        point("mu")
        if y is None:
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(0.0, 1.0))

    svi = PyroSVIModule(two_observed, guide, dataset_size=N)
    whole, part = svi.loss({"x": X, "y": X}).item(), svi.loss({"x": X}).item()
    # q(y) is p(y | mu = 0), whose terms cancel.
    assert whole - part == pytest.approx(-N / B * log_normal(X).item(), rel=1e-5)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceEnum_ELBO])
def test_global_latent_that_the_guide_lacks(elbo):
    match = ["latent site 'shift' (shape (3,), in no plate)", "pyro.sample('shift', ...)", "obs="]
    refused(match, two_latents, lambda x: point("mu"), elbo=elbo())


def test_latent_that_a_block_hides_from_the_autoguide():
    guide = AutoNormal(poutine.block(two_latents, hide=["shift"]))
    refused(["latent site 'shift'"], two_latents, guide)


def test_local_latent_that_the_guide_lacks():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    match = ["latent site 'z' (shape (5,), in plate 'data' of size 5)"]
    refused(match, model, lambda x: pyro.param("unused", torch.tensor(0.0)))


def test_missing_data_without_a_guide():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean(), 1.0), obs=x, obs_mask=x > 0)

    refused(["latent site 'x_unobserved'"], model, lambda x: None)


def label_model(x, marked="parallel"):
    with pyro.plate("data", len(x)):
        infer = {"enumerate": marked} if marked else {}
        label = pyro.sample("label", dist.Bernoulli(0.3), infer=infer)
        pyro.sample("x", dist.Normal(mean() + label, 1.0), obs=x)


def test_latent_marked_for_enumeration_under_an_elbo_that_does_not():
    refused(["latent site 'label'", "elbo=TraceEnum_ELBO()"], label_model, lambda x: None)


@pytest.mark.parametrize("marked", [None, "sequential"])
def test_discrete_latent_that_is_not_summed_out_in_the_model(marked):
    model = partial(label_model, marked=marked)
    match = ["latent site 'label'", "infer={'enumerate': 'parallel'} and TraceEnum_ELBO"]
    refused(match, model, lambda x: None, elbo=TraceEnum_ELBO(strict_enumeration_warning=False))


def test_latent_that_is_summed_out_needs_no_guide():
    each = torch.logaddexp(
        math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(X),
        math.log(0.3) + dist.Normal(1.0, 1.0).log_prob(X),
    )
    loss = loss_of(label_model, lambda x: None, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    assert loss == pytest.approx(-N / B * each.sum().item(), rel=1e-6)


def test_latent_without_a_term_needs_no_guide():
    # As a prediction that nothing depends on: its mask leaves no log-probability.
    def model(x):
        normal_mean(x)
        with poutine.mask(mask=False):
            pyro.sample("prediction", dist.Normal(0.0, 1.0))

    expected = log_normal(torch.tensor(0.0), scale=0.1) + N / B * log_normal(X)
    loss = loss_of(model, lambda x: point("mu"))
    assert loss == pytest.approx(-expected.item(), rel=1e-6)


# -- a guide site without a latent -----------------------------------------------------------------


def test_guide_site_that_the_model_lacks():
    def guide(x):
        point("mu")
        pyro.sample("sigma", dist.Normal(0.0, 1.0))

    match = ["latent site 'sigma'", "no site of the model", "'mu'", "{'is_auxiliary': True}"]
    refused(match, normal_mean, guide)


def test_guide_site_that_the_model_observes():
    def guide(x):
        point("mu")
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    refused(["latent site 'x'", "observed in the model"], normal_mean, guide)


def test_observation_in_the_guide():
    def guide(x):
        point("mu")
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    refused(["observed site 'y'", "no site of the model"], normal_mean, guide)


def test_auxiliary_and_deterministic_sites_and_factors_of_a_guide_pass():
    def guide(x):
        at = pyro.sample(
            "at", dist.Delta(pyro.param("p", torch.tensor(0.0))), infer={"is_auxiliary": True}
        )
        pyro.deterministic("twice", 2 * at)
        pyro.factor("density", torch.tensor(0.25), has_rsample=True)
        pyro.sample("mu", dist.Delta(at))

    # A factor of the guide is a term of log q.
    expected = log_normal(torch.tensor(0.0), scale=0.1) + N / B * log_normal(X) - 0.25
    assert loss_of(normal_mean, guide) == pytest.approx(-expected.item(), rel=1e-6)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoDiagonalNormal])
def test_auxiliary_sites_of_autoguides_pass(guide):
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    assert math.isfinite(loss_of(model, guide))


def test_checks_can_be_turned_off():
    # Pyro's own loss then: log p(shift) without log q(shift), of a draw from the prior.
    svi = PyroSVIModule(two_latents, lambda x: point("mu"), dataset_size=N, checks=False)
    svi.loss(X)
    torch.manual_seed(3)
    loss = svi.loss(X).item()
    torch.manual_seed(3)
    shift = torch.randn(3)
    terms = log_normal(torch.tensor(0.0)), log_normal(shift), N / B * log_normal(X, shift.sum())
    assert loss == pytest.approx(-sum(terms).item(), rel=1e-5)


# -- scales that differ ----------------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("part", ["model", "guide"])
def test_scale_of_the_user_in_one_of_the_two(elbo, part):
    # Around the guide's site alone, Trace_ELBO would temper q's entropy and TraceMeanField_ELBO
    # the whole KL; around the model's alone, the prior only, or nothing.
    def scaled(fn):
        return poutine.scale(fn, scale=0.5)

    def latent(x):
        return pyro.sample("mu", dist.Normal(0.0, 0.1))

    def model(x):
        observe((scaled(latent) if part == "model" else latent)(x), x)

    def guide(x):
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.2))

    scales = (0.5, 1) if part == "model" else (1, 0.5)
    told = f"'mu' has scale {scales[0]} in the model (in no plate) but {scales[1]} in the guide"
    match = [told, "poutine.scale belongs around the latents of both"]
    refused(match, model, scaled(guide) if part == "guide" else guide, elbo=elbo())


def test_weight_of_the_kl_in_model_and_guide_passes():
    @poutine.scale(scale=0.5)
    def latent(distribution):
        return pyro.sample("mu", distribution)

    def guide(x):
        latent(dist.Normal(pyro.param("loc", torch.tensor(0.05)), 0.2))

    # KL between Normals, in closed form; expected likelihood likewise.
    kl = math.log(0.1 / 0.2) + (0.2**2 + 0.05**2) / (2 * 0.1**2) - 0.5
    elbo = TraceMeanField_ELBO(num_particles=20_000, vectorize_particles=True)
    loss = loss_of(lambda x: observe(latent(dist.Normal(0.0, 0.1)), x), guide, elbo=elbo)
    likelihood = N / B * (log_normal(X, 0.05) - B * 0.2**2 / 2)
    # A draw's loss has an sd of about N * mean(x) * 0.2 = 1.8; 5 standard errors of the mean.
    assert loss == pytest.approx(0.5 * kl - likelihood.item(), abs=5 * 1.8 / math.sqrt(20_000))
