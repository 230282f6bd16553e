"""Log-likelihoods of rows whose discrete latents the ELBO sums out, against sums by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_lightning import PyroSVIModule
from pyro_lightning.predictive import log_likelihood_of, predictive_draws

B, S = 12, 40
X = torch.linspace(-1, 1, B)
Y = 0.5 * X + 0.1

W = torch.tensor([0.2, 0.5, 0.3])
LOCS = torch.tensor([-2.0, 0.0, 3.0])


def mixture(y, u=None, t=None):
    """Discrete latents of each row, over what a row observes."""
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), dim=-1):
        k = pyro.sample("k", dist.Categorical(W), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(LOCS[k] + shift, 0.7), obs=y)
        if u is not None:
            pyro.sample("u", dist.Normal(k.float(), 1.0), obs=u)
            pyro.sample("v", dist.Normal(shift, 1.0), obs=u)
        if t is not None:
            with pyro.plate("time", 3, dim=-2):
                pyro.sample("t", dist.Normal(LOCS[k], 1.0), obs=t.T)


def component_densities(posterior, y):
    """log p(y | k), (S, B, 3)."""
    locs = LOCS + posterior["shift"][:, None, None]
    return dist.Normal(locs, 0.7).log_prob(y[:, None])


def shift_alone(y, u=None, t=None):
    pyro.sample("shift", dist.Normal(pyro.param("m", torch.tensor(0.3)), 0.5))


def summed_out(*batch):
    torch.manual_seed(0)
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    svi = PyroSVIModule(mixture, shift_alone, elbo, dataset_size=100)
    svi.loss(batch)
    return svi, svi.posterior_samples(S)


@pytest.mark.parametrize("parallel", [None, True, False])
@pytest.mark.parametrize("rows", [B, 1])
def test_log_likelihood_sums_out_what_the_elbo_does(parallel, rows):
    svi, posterior = summed_out(Y)
    found = log_likelihood_of(svi, Y[:rows], posterior, parallel=parallel, chunk_size=7)
    expected = (component_densities(posterior, Y[:rows]) + W.log()).logsumexp(-1)
    assert found.keys() == {"y"}
    torch.testing.assert_close(found["y"], expected)


@pytest.mark.parametrize("parallel", [True, False])
def test_sites_that_share_a_latent_that_is_summed_out_have_one_likelihood(parallel):
    svi, posterior = summed_out(Y, X)
    found = log_likelihood_of(svi, (Y, X), posterior, parallel=parallel)
    under_k = component_densities(posterior, Y) + dist.Normal(torch.arange(3.0), 1.0).log_prob(
        X[:, None]
    )
    assert found.keys() == {"u+y", "v"}
    torch.testing.assert_close(found["u+y"], (under_k + W.log()).logsumexp(-1))
    expected = dist.Normal(posterior["shift"][:, None], 1.0).log_prob(X)
    torch.testing.assert_close(found["v"], expected)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_latent_that_is_summed_out_joins_the_plates_within_its_row(parallel):
    t = torch.stack([X, X + 1, X - 2], 1)
    svi, posterior = summed_out(Y, None, t)
    found = log_likelihood_of(svi, (Y, None, t), posterior, parallel=parallel)
    of_times = dist.Normal(LOCS, 1.0).log_prob(t[..., None]).sum(1)
    under_k = component_densities(posterior, Y) + of_times
    assert found.keys() == {"t+y"}
    torch.testing.assert_close(found["t+y"], (under_k + W.log()).logsumexp(-1))


def test_latents_that_are_summed_out_are_drawn_from_the_prior():
    svi, _ = summed_out(Y)
    posterior = {"shift": torch.zeros(3000)}
    k = predictive_draws(svi, Y[:2], posterior, sites="k", parallel=True)["k"]
    found = torch.stack([(k == each).float().mean() for each in range(3)])
    assert (found - W).abs().max() < 5 * (0.25 / 6000) ** 0.5


def of_lengths(x, lengths):
    """Chains that end where the mask says, latents and all, as Pyro's guide to HMMs has it."""
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    turn = torch.stack([torch.stack([1 - p, p], -1), torch.stack([p, 1 - p], -1)], -2)
    with pyro.plate("data", len(x), dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            with pyro.poutine.mask(mask=t < lengths):
                chance = turn.squeeze()[z]
                z = pyro.sample(f"z{t}", dist.Categorical(chance), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(LOCS[z], 1.0), obs=x[:, t])


def test_latents_past_the_end_of_a_sequence_add_nothing_to_its_likelihood():
    def guide(x, lengths):
        pyro.sample("p", dist.Beta(pyro.param("a", torch.tensor(3.0)), 2.0))

    x, lengths = torch.stack([X, X - 1, X + 1], 1), torch.arange(B) % 4
    torch.manual_seed(0)
    svi = PyroSVIModule(of_lengths, guide, TraceEnum_ELBO(max_plate_nesting=1), dataset_size=100)
    svi.loss((x, lengths))
    posterior = svi.posterior_samples(S)
    found = log_likelihood_of(svi, (x, lengths), posterior)["x0+x1+x2"]
    p = posterior["p"]
    turn = torch.stack([torch.stack([1 - p, p], -1), torch.stack([p, 1 - p], -1)], -2)
    for row, length in enumerate(lengths.tolist()):
        state = torch.tensor([1.0, 0.0]).expand(S, 2)  # the forward algorithm, to its end
        for t in range(length):
            of_value = dist.Normal(LOCS[:2], 1.0).log_prob(x[row, t]).exp()
            state = (state.unsqueeze(-1) * turn).sum(-2) * of_value
        torch.testing.assert_close(found[:, row], state.sum(-1).log())
