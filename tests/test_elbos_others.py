"""Trace_MMD and EnergyDistance, which are no ELBOs, and the ELBOs that are refused."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_models import (
    N,
    WholeGuide,
    WholeModel,
    assert_same,
    gradients,
    log_evidence_of_rows,
    value_and_gradients,
)
from pyro.contrib.gp.kernels import RBF
from pyro.infer import (
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from support import (
    MixedGuide,
    MixedModel,
    assert_equal_to_pyro,
    mixed_rows,
    quiet_trainer,
    with_plate,
)
from torch import nn
from torch.utils.data import DataLoader

from pyro_lightning import PyroSVIModule, negative_elbo


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Drawn(WholeModel):
    """The same model with Pyro's own subsampled plate."""

    def forward(self, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(mu + self.shift, 1.0), obs=y)


def module(elbo, model=WholeModel):
    return PyroSVIModule(model(), WholeGuide(), elbo, dataset_size=N)


# -- Trace_MMD -------------------------------------------------------------------------------------


def mmd(in_plate=True, particles=3, scale=5.0):
    nesting = {"max_plate_nesting": 1} if in_plate else {}
    kernel = RBF(1, lengthscale=torch.tensor(0.5))
    return Trace_MMD(kernel, scale, particles, vectorize_particles=in_plate, **nesting)


@pytest.mark.parametrize("in_plate", [True, False])
def test_mmd_scales_the_likelihood_alone_as_pyros_plate_does(in_plate):
    svi, y = module(mmd(in_plate)), torch.linspace(-1, 2, 4)
    svi.loss(y)
    pair = value_and_gradients(svi, y)
    svi.zero_grad()
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=True):
        model = Drawn()
        model.shift = svi.model.shift
        value = svi.elbo.loss_and_grads(model, svi.guide, y)
    assert_same(pair, (value, gradients(svi)))


def expected_mmd_loss(loc, scale, y, size, particles, penalty, length):
    """Closed form: minus the expected log-likelihood, and kernel means of Normals.

    The kernel of a draw with itself is 1, which the mean over K^2 pairs holds K times.
    """

    def mean_kernel(distance, variance):
        width = length**2 + variance
        return length / width.sqrt() * (-0.5 * distance**2 / width).exp()

    own = sum(
        1 / particles + (1 - 1 / particles) * mean_kernel(torch.zeros(()), 2 * v)
        for v in (torch.ones(()), scale**2)
    )
    distance = own - 2 * mean_kernel(loc, 1 + scale**2)
    rows = -0.5 * ((y - 0.3 - loc) ** 2 + scale**2) - 0.5 * torch.tensor(2 * torch.pi).log()
    return -size / len(y) * rows.sum() + penalty * distance


def test_expected_mmd_loss():
    # The mean of 100 times 100 particles, one of which has an sd of about 4.
    svi, y = module(mmd(particles=100)), torch.linspace(-1, 2, 4)
    with torch.no_grad():
        loss = torch.stack([svi.loss(y) for _ in range(100)]).mean()
        guide = svi.guide
        expected = expected_mmd_loss(guide.loc, guide.log_s.exp(), y, N, 100, 5.0, 0.5)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0.15)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_mmd_validation(mode):
    svi, y = module(mmd()), torch.linspace(-1, 2, 4)
    svi.loss(y)
    torch.manual_seed(0)
    with mode():
        value = svi.loss(y)
    torch.testing.assert_close(value.clone(), value_and_gradients(svi, y)[0])


def test_mmd_of_a_local_latent_is_refused():
    parts = MixedModel(batch_plate), MixedGuide(batch_plate)
    svi = PyroSVIModule(*parts, mmd(in_plate=False), dataset_size=N)
    with pytest.raises(ValueError, match="latent site 'offset', which stands in the data plate"):
        svi.loss(tuple(column[:4] for column in mixed_rows(N)))


# -- EnergyDistance --------------------------------------------------------------------------------


@pytest.mark.parametrize("prior_scale", [0.0, 0.5])
def test_energy_distance_of_a_full_batch_equals_pyros(prior_scale):
    y = torch.linspace(-1, 2, N)
    elbo = EnergyDistance(prior_scale=prior_scale, num_particles=3, max_plate_nesting=2)
    svi = module(elbo)
    svi.loss(y)
    pair = value_and_gradients(svi, y)
    svi.zero_grad()
    torch.manual_seed(0)
    with pyro.settings.context(module_local_params=True):
        value = elbo(svi.model, svi.guide, y)
    value.backward()
    assert_same(pair, (value.detach(), gradients(svi)))
    with torch.inference_mode():
        torch.manual_seed(0)
        assert float(svi.loss(y)) == float(value.detach())


def test_energy_distance_of_a_part_of_the_rows_is_refused():
    with pytest.raises(ValueError, match="squared distance of all N rows at once"):
        module(EnergyDistance()).loss(torch.zeros(4))


# -- particles, and validation ---------------------------------------------------------------------


def batch_plate(x, rows):
    return pyro.plate("data", len(x))


def rows_plate(x, rows):
    return pyro.plate("data", N, subsample=rows)


@pytest.mark.parametrize("in_plate", [True, False])
@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, TraceEnum_ELBO])
def test_particles_equal_pyros(elbo, in_plate):
    # assert_equal_to_pyro compares the value without gradients as well.
    options = {"num_particles": 3, "vectorize_particles": in_plate, "max_plate_nesting": 1}
    elbo = partial(elbo, **options, strict_enumeration_warning=False)
    ours = MixedModel(batch_plate), MixedGuide(batch_plate)
    theirs = [with_plate(part, rows_plate) for part in ours]
    assert_equal_to_pyro(elbo, ours, theirs, tuple(c[:4] for c in mixed_rows(N)), N)


@pytest.mark.parametrize(
    "elbo",
    [
        partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False),
        TraceGraph_ELBO,
        partial(RenyiELBO, 0.5),
        partial(ReweightedWakeSleep, max_plate_nesting=1),
        partial(TraceTMC_ELBO, max_plate_nesting=1, strict_enumeration_warning=False),
    ],
    ids=["TraceEnum", "TraceGraph", "Renyi", "wake-sleep", "TraceTMC"],
)
def test_a_fit_with_validation_in_ragged_batches(elbo):
    # With the guide of each row exact and fixed, each ratio of densities is the row's evidence; the
    # rows validated are those of the training set, and their losses add up to the whole.
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.3, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        scale = pyro.param("scale", torch.tensor(0.5**0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.15 + y / 2, scale))

    y = torch.linspace(-1, 2, N)
    optimizer = partial(torch.optim.SGD, lr=0.0)
    svi = PyroSVIModule(model, guide, elbo(), optimizer)
    loaders = (DataLoader(y, batch_size=5) for _ in range(2))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(svi, *loaders)
    expected = -float(log_evidence_of_rows(y))
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(expected, rel=1e-6)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(expected, rel=1e-6)


# -- several sizes ---------------------------------------------------------------------------------


def test_data_plates_of_several_sizes_leave_no_one_factor():
    model, guide = WholeModel(), WholeGuide()
    with pytest.raises(ValueError, match="data plates have sizes 10, 20"):
        negative_elbo(
            RenyiELBO(),
            model,
            guide,
            (torch.zeros(2),),
            {},
            plates={"a": 10, "b": 20},
            batch_size=2,
        )


def test_a_module_without_guide_parameters_still_has_a_value():
    # Nothing of the loss requires a gradient.
    class Model(nn.Module):
        def forward(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    y = torch.linspace(-1, 1, 3)
    expected = -N / 3 * dist.Normal(0.0, 1.0).log_prob(y).sum()
    loss = PyroSVIModule(Model(), lambda y: None, RenyiELBO(), dataset_size=N).loss(y)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
