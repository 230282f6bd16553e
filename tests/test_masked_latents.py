"""Latents with a mask: the guide's terms are masked as the model's are, or the model is refused.

The oracle is Pyro's loss on its own subsampled plate with the same noise, where a guide writes the
mask by hand; closed forms of the posterior; and gradients that must be nothing.

In plain Pyro, with AutoNormal and ``obs_mask`` on 12 rows of which 8 are observed, the sds of the 8
latents that stand for nothing are 17, 31, 46 and 62 after 1000, 2000, 3000 and 4000 steps, and the
loss falls from 28 to -22, -26, -30 and -33. Here they stay at 0.1 and the loss at 12.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from check_support import POINTER
from pyro import poutine
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from support import no_validation, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N, B = 12, 4
X = torch.linspace(-1, 2, N)
THERE = torch.arange(N) % 3 != 0
ROWS = torch.tensor([3, 7, 6, 1])  # two of them are not there


def missing_values(x, there):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=there)


def padded(x, there, prior=lambda mu: dist.LogNormal(mu, 0.5)):
    """Rows that are not there have no term at all."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), poutine.mask(mask=there):
        z = pyro.sample("z", prior(mu))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def only_rows(x, there):
    with pyro.plate("data", len(x)), poutine.mask(mask=there):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.6), obs=x)


def numbered(rows, there=THERE):
    return IndexedBatch((X[rows], there[rows]), rows)


def gradients(svi, batch):
    svi.zero_grad()
    svi.loss(batch).backward()
    found = {}
    for name, parameter in svi.named_parameters():
        grad = parameter.grad
        found[name] = grad.to_dense() if grad.is_sparse else grad
    return found


# -- right ------------------------------------------------------------------------------------


class ByHand(nn.Module):
    """The guide of ``missing_values`` and ``padded``, with Pyro's plate and a mask of its own."""

    def __init__(self, site):
        super().__init__()
        self.site = site
        self.slope = nn.Parameter(torch.tensor(0.4))
        self.spread = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, there, plate=None, masked=False):
        pyro.sample("mu", dist.Normal(self.slope, 0.1))
        with plate or pyro.plate("data", len(x)):
            with poutine.mask(mask=there if masked else torch.ones_like(there)):
                pyro.sample(self.site, dist.LogNormal(self.slope * x, self.spread))


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO,
        TraceMeanField_ELBO,
        partial(Trace_ELBO, num_particles=3),
        partial(Trace_ELBO, num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ],
    ids=["Trace", "TraceMeanField", "particles", "particles in a plate"],
)
@pytest.mark.parametrize("by_hand", [False, True], ids=["carried", "the guide's own as well"])
def test_loss_and_gradients_are_those_of_a_guide_with_the_model_s_mask(elbo, by_hand):
    guide = ByHand("z")
    svi = PyroSVIModule(padded, partial(guide.forward, masked=by_hand), elbo=elbo(), dataset_size=N)
    x, there = X[ROWS], THERE[ROWS]
    svi.loss((x, there))
    torch.manual_seed(2)
    loss = svi.loss((x, there))

    def in_pyro(part, **options):
        def run():
            plate = pyro.plate("data", N, subsample=ROWS)
            return part(x, there, plate=plate, **options)

        return run

    def model(x, there, plate):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with plate, poutine.mask(mask=there):
            z = pyro.sample("z", dist.LogNormal(mu, 0.5))
            pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    torch.manual_seed(2)
    expected = elbo().differentiable_loss(in_pyro(model), in_pyro(guide, masked=True))
    torch.testing.assert_close(loss, expected)
    ours, theirs = (
        torch.autograd.grad(each, list(guide.parameters())) for each in (loss, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "model, site", [(missing_values, "x_unobserved"), (padded, "z")], ids=["obs_mask", "padding"]
)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
def test_entries_without_a_term_give_autonormal_no_gradient(model, site, elbo):
    there = ~THERE if site == "x_unobserved" else THERE
    found = gradients(PyroSVIModule(model, elbo=elbo(), dataset_size=N), numbered(ROWS))
    for kind in ("locs", "scales"):
        moved = found[f"guide.{kind}.{site}_unconstrained"] != 0
        expected = torch.zeros(N, dtype=torch.bool).scatter(0, ROWS, there[ROWS])
        assert moved.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "elbo",
    [
        partial(RenyiELBO, alpha=0.5, num_particles=2),
        partial(ReweightedWakeSleep, num_particles=2, insomnia=1.0, model_has_params=False),
    ],
    ids=["Renyi", "wake-sleep"],
)
def test_elbos_of_rows_give_no_gradient_either(elbo):
    found = gradients(PyroSVIModule(only_rows, elbo=elbo(), dataset_size=N), numbered(ROWS))
    moved = found["guide.scales.z_unconstrained"] != 0
    assert moved.nonzero().flatten().tolist() == sorted(ROWS[THERE[ROWS]].tolist())


@no_validation
def test_fit_with_padded_rows():
    # z_i | x_i is Normal with precision 1 + 1 / 0.36; what is not there is left as it was made.
    data = ArrayDataModule((X, THERE), batch_size=B)
    start = init_to_value(values={"z": torch.tensor(0.0)})
    svi = PyroSVIModule(
        only_rows,
        partial(AutoNormal, init_loc_fn=start),
        elbo=Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1),
        optimizer=partial(torch.optim.Adam, lr=0.05),
    )
    quiet_trainer(max_epochs=80).fit(svi, datamodule=data)
    loc, scale = (part.z.detach() for part in (svi.guide.locs, svi.guide.scales))
    precision = 1 + 1 / 0.36
    # Adam wanders by some hundredths at this rate; a guide without the mask has sd above 1.
    torch.testing.assert_close(loc[THERE], X[THERE] / 0.36 / precision, atol=0.1, rtol=0)
    torch.testing.assert_close(
        scale[THERE], torch.full_like(scale[THERE], precision**-0.5), atol=0.1, rtol=0
    )
    assert (loc[~THERE] == 0).all()
    torch.testing.assert_close(scale[~THERE], torch.full_like(scale[~THERE], 0.1))


def test_beside_a_parameter_of_each_row_in_the_model():
    def model(x, there):
        with pyro.plate("data", len(x)):
            shift = pyro.param("shift", torch.zeros(N), event_dim=0)
            with poutine.mask(mask=there):
                z = pyro.sample("z", dist.Normal(shift, 1.0))
                pyro.sample("x", dist.Normal(z, 0.6), obs=x)

    moved = gradients(PyroSVIModule(model, dataset_size=N), numbered(ROWS))
    for name in ("_pyro_param_store.shift", "guide.scales.z_unconstrained"):
        assert moved[name].nonzero().flatten().tolist() == sorted(ROWS[THERE[ROWS]].tolist())


def test_mask_of_the_distribution():
    def model(x, there):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(there))
            pyro.sample("x", dist.Normal(torch.where(there, z, 0.0), 1.0), obs=x)

    found = gradients(PyroSVIModule(model, dataset_size=N), numbered(ROWS))
    moved = found["guide.scales.z_unconstrained"] != 0
    assert moved.nonzero().flatten().tolist() == sorted(ROWS[THERE[ROWS]].tolist())


def global_effects(x, kinds):
    known = torch.tensor([True, False, True])
    with pyro.plate("kinds", len(known)), poutine.mask(mask=known):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(effect[kinds], 1.0), obs=x)


def test_global_latent_with_a_mask():
    batch = torch.zeros(4), torch.tensor([0, 0, 2, 0])
    found = gradients(PyroSVIModule(global_effects, dataset_size=N), batch)
    moved = found["guide.scales.effect_unconstrained"] != 0
    assert moved.tolist() == [True, False, True]


def test_first_batch_in_which_nothing_is_left_out():
    svi = PyroSVIModule(padded, dataset_size=N)
    svi.loss(numbered(ROWS, torch.ones(N, dtype=torch.bool)))
    moved = gradients(svi, numbered(ROWS))["guide.scales.z_unconstrained"] != 0
    assert moved.nonzero().flatten().tolist() == sorted(ROWS[THERE[ROWS]].tolist())


def test_point_of_each_row():
    # A point has no density, and so nothing that grows.
    svi = PyroSVIModule(padded, AutoDelta, dataset_size=N)
    moved = gradients(svi, numbered(ROWS))["guide.z_unconstrained"] != 0
    assert moved.nonzero().flatten().tolist() == sorted(ROWS[THERE[ROWS]].tolist())


def free_mean(x, mask=lambda fn: fn.mask(False), around=True):
    """A mean whose prior is masked whole: flat."""
    with poutine.mask(mask=around):
        mu = pyro.sample("mu", mask(dist.Normal(0.0, 1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.mark.parametrize(
    "model",
    [free_mean, partial(free_mean, mask=lambda fn: fn, around=False)],
    ids=["of the distribution", "around the site"],
)
def test_flat_prior_keeps_the_guide_s_term(model):
    # The posterior is N(mean(x), 1 / N), and the negative ELBO there is its negative log-evidence.
    svi = PyroSVIModule(model, dataset_size=N, elbo=Trace_ELBO(num_particles=5))
    svi.loss(X)
    with torch.no_grad():
        svi.guide.locs.mu, svi.guide.scales.mu = X.mean(), torch.tensor(N**-0.5)
    evidence = dist.Normal(X.mean(), 1.0).log_prob(X).sum() - dist.Normal(0.0, N**-0.5).log_prob(
        torch.tensor(0.0)
    )
    torch.testing.assert_close(svi.loss(X).detach(), -evidence, rtol=1e-5, atol=1e-5)


def test_prediction_under_a_mask_does_not_widen_its_guide():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with poutine.mask(mask=False):
            pyro.sample("prediction", dist.Normal(mu, 1.0))

    found = gradients(PyroSVIModule(model, dataset_size=N), X[:B])
    assert found["guide.scales.prediction_unconstrained"] == 0


def test_site_table_masks_the_guide_s_terms():
    svi = PyroSVIModule(padded, dataset_size=N)
    torch.manual_seed(4)
    table = svi.site_table(numbered(ROWS))
    none = svi.site_table(numbered(ROWS, torch.zeros(N, dtype=torch.bool)))
    assert none["z"].log_q == none["z_unconstrained"].log_q == 0.0
    assert table["z_unconstrained"].log_q != 0.0


# -- refused ----------------------------------------------------------------------------------


def refused(match, model, batch, *arguments, **options):
    svi = PyroSVIModule(model, *arguments, dataset_size=N, **options)
    with pytest.raises(ValueError) as caught:
        svi.loss(batch)
    for part in [*match, POINTER]:
        assert part in str(caught.value)


def prior_in_part(x, there):
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=there):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_rows_without_a_prior_that_others_depend_on():
    refused(["latent site 'z'", "no prior", "mask the likelihood"], prior_in_part, numbered(ROWS))


def test_rows_without_a_prior_in_a_later_batch():
    svi = PyroSVIModule(prior_in_part, dataset_size=N)
    svi.loss(numbered(ROWS, torch.ones(N, dtype=torch.bool)))
    with pytest.raises(ValueError, match="latent site 'z'.* no prior"):
        svi.loss(numbered(ROWS))


def test_mask_that_comes_with_a_later_batch():
    def model(x, there):
        with pyro.plate("data", len(x)), poutine.mask(mask=True if there.all() else there):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss(numbered(ROWS, torch.ones(N, dtype=torch.bool)))
    with pytest.raises(ValueError, match="'z'.* mask in this batch and had none in the first"):
        svi.loss(numbered(ROWS))


def test_joint_guide_of_a_latent_with_a_mask():
    match = ["latent site 'effect'", "AutoMultivariateNormal", "AutoNormal"]
    batch = torch.zeros(4), torch.tensor([0, 0, 2, 0])
    refused(match, global_effects, batch, AutoMultivariateNormal)


def test_joint_guide_beside_the_latent_with_a_mask():
    guide = AutoGuideList(padded)
    guide.append(AutoMultivariateNormal(poutine.block(padded, expose=["mu"])))
    guide.append(AutoNormal(poutine.block(padded, hide=["mu"])))
    moved = gradients(PyroSVIModule(padded, guide, dataset_size=N), numbered(ROWS))
    moved = moved["guide.1.scales.z_unconstrained"] != 0
    assert moved.nonzero().flatten().tolist() == sorted(ROWS[THERE[ROWS]].tolist())


def test_mask_within_an_event():
    def model(x):
        known = torch.tensor([True, False, True])
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).mask(known).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w[0] + w[2], 1.0), obs=x)

    refused(["latent site 'w'", "within its event", "pyro.plate"], model, X[:B])


def test_flat_prior_around_the_site_under_an_analytic_kl():
    model = partial(free_mean, mask=lambda fn: fn, around=False)
    refused(["latent site 'mu'", "TraceMeanField_ELBO"], model, X, elbo=TraceMeanField_ELBO())


def test_discrete_latent_with_a_mask():
    # The guide draws it: log p - log q of the rows that are there alone, times N / B.
    def model(x, there):
        with pyro.plate("data", len(x)), poutine.mask(mask=there):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x, there):
        odds = pyro.param("odds", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Bernoulli(logits=odds), infer={"enumerate": "parallel"})

    x, there = X[ROWS], THERE[ROWS]
    svi = PyroSVIModule(model, guide, dataset_size=N, elbo=TraceEnum_ELBO(max_plate_nesting=1))
    q = torch.stack([torch.sigmoid(torch.tensor(-0.5)), torch.sigmoid(torch.tensor(0.5))])
    p = torch.tensor([0.7, 0.3])
    rows = sum(q[k] * (p[k].log() - q[k].log() + dist.Normal(k, 1.0).log_prob(x)) for k in (0, 1))
    torch.testing.assert_close(svi.loss((x, there)).detach(), -N / B * rows[there].sum())
