"""A global latent that the model sums out is refused with scaled rows; what Pyro can do, passes.

Losses of what passes are compared with closed forms by hand.
"""

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
from pyro.infer import TraceEnum_ELBO


def mean():
    """Something that trains, at 0."""
    return pyro.param("mean", torch.tensor(0.0))


def observe(loc, x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


# -- a global latent that is summed out ------------------------------------------------------------

LOCS, WEIGHTS = torch.tensor([-1.0, 2.0]), torch.tensor([0.3, 0.7])
IN_PARALLEL = {"enumerate": "parallel"}


def category(name, infer=IN_PARALLEL):
    return pyro.sample(name, dist.Categorical(WEIGHTS), infer=infer)


def enumerating():
    return TraceEnum_ELBO(max_plate_nesting=1)


@pytest.mark.parametrize("where", [{}, {"data_plate": None, "scale_sites": ["x"]}])
def test_global_latent_summed_out_over_scaled_rows(where):
    def model(x):
        loc = LOCS[category("k")] + mean()
        if not where:
            observe(loc, x)
        else:
            loc = torch.as_tensor(loc)[..., None].expand(loc.shape + x.shape)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    match = ["latent site 'k' (shape (), in no plate)", "'x'", "Sample it in the guide"]
    refused(match, model, lambda x: None, elbo=enumerating(), **where)


def test_global_and_local_latents_summed_out_though_independent():
    def model(x):
        pyro.sample("y", dist.Normal(LOCS[category("k")], 1.0), obs=torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            loc = LOCS[category("label")] + mean()
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    refused(["latent site 'k'", "'label', 'x'"], model, lambda x: None, elbo=enumerating())


@pytest.mark.parametrize("how", ["poutine.scale", "scale_sites"])
def test_global_latent_summed_out_and_scaled_itself(how):
    # Pyro finds one scale for all, and puts it outside the logarithm, without an error.
    def model(x):
        with poutine.scale(scale=N / B if how == "poutine.scale" else 1.0):
            k = category("k")
        observe(LOCS[k] + mean(), x)

    options = {"scale_sites": ["k"]} if how == "scale_sites" else {}
    match = ["latent site 'k'", "scaled by N/B = 4", "outside the logarithm"]
    refused(match, model, lambda x: None, elbo=enumerating(), **options)


def test_global_latent_summed_out_over_the_whole_data_set():
    def model(x):
        observe(LOCS[category("k")] + mean(), x)

    each = torch.stack([log_normal(X, loc) for loc in LOCS])
    loss = loss_of(model, lambda x: None, elbo=enumerating(), dataset_size=B)
    assert loss == pytest.approx(-(WEIGHTS.log() + each).logsumexp(0).item(), rel=1e-6)


def test_global_latent_summed_out_over_what_is_not_scaled():
    def model(x):
        pyro.sample("y", dist.Normal(LOCS[category("k")], 1.0), obs=torch.tensor(0.4))
        observe(mean(), x)

    each = torch.stack([log_normal(torch.tensor(0.4), loc) for loc in LOCS])
    expected = (WEIGHTS.log() + each).logsumexp(0) + N / B * log_normal(X)
    loss = loss_of(model, lambda x: None, elbo=enumerating())
    assert loss == pytest.approx(-expected.item(), rel=1e-6)


@pytest.mark.parametrize("marked", ["parallel", "sequential"])
@pytest.mark.parametrize("local", [False, True])
def test_global_latent_enumerated_in_the_guide(marked, local):
    # What the refusal advises: the exact mean over q(k), of terms that are scaled one by one.
    q = torch.tensor([0.4, 0.6])

    def model(x):
        k = category("k", {})
        with pyro.plate("data", len(x)):
            shift = category("label") if local else 0
            pyro.sample("x", dist.Normal(LOCS[k] + shift + mean(), 1.0), obs=x)

    def guide(x):
        pyro.sample("k", dist.Categorical(q), infer={"enumerate": marked})

    rows = [[dist.Normal(loc + shift, 1.0).log_prob(X) for shift in (0, 1)] for loc in LOCS]
    if local:
        likelihoods = [torch.logsumexp(WEIGHTS.log()[:, None] + torch.stack(r), 0) for r in rows]
    else:
        likelihoods = [r[0] for r in rows]
    scaled = N / B * torch.stack(likelihoods).sum(-1)
    expected = (q * (WEIGHTS.log() - q.log() + scaled)).sum()
    loss = loss_of(model, guide, elbo=enumerating())
    assert loss == pytest.approx(-expected.item(), rel=1e-6)
