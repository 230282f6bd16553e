"""Posteriors of latents of each row, and draws of them.

The model is ``mu ~ N(0, 10), z_i ~ N(mu, 1), x_i ~ N(z_i, 0.5)``, whose posterior is known.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N, TAU, S = 60, 1.0, 0.5
Z, NOISE = torch.randn(2, N, generator=torch.Generator().manual_seed(0))
X = 2 + TAU * Z + S * NOISE


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, TAU))
        pyro.sample("x", dist.Normal(z, S), obs=x)


def exact():
    """Means and sds of the posterior: mu, then each z."""
    total = TAU**2 + S**2
    precision = 1 / 100 + N / total
    mu = X.sum() / total / precision
    shrink = TAU**2 / total
    mean = mu + shrink * (X - mu)
    sd = (TAU**2 * S**2 / total + (1 - shrink) ** 2 / precision) ** 0.5
    return (mu, precision**-0.5), (mean, sd)


ADAM = partial(torch.optim.Adam, lr=0.1)


def fitted(guide=AutoNormal, batch_size=20, epochs=600, particles=4, rate=0.99, optimizer=ADAM):
    torch.manual_seed(1)
    svi = PyroSVIModule(
        model,
        guide,
        elbo=Trace_ELBO(particles, max_plate_nesting=1, vectorize_particles=particles > 1),
        optimizer=optimizer,
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, rate),
    )
    data = ArrayDataModule(X, batch_size=batch_size)
    quiet_trainer(max_epochs=epochs).fit(svi, datamodule=data)
    return svi


# -- posteriors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [20, 25], ids=["equal", "ragged"])
def test_autonormal_recovers_every_row(batch_size):
    svi = fitted(batch_size=batch_size)
    (mu, mu_sd), (mean, sd) = exact()
    median = svi.guide.median()
    assert float((((median["z"] - mean) / sd) ** 2).mean().sqrt()) < 0.15
    assert float((median["mu"] - mu).abs() / mu_sd) < 0.3
    # The best mean-field guide has the sds of the conditionals; what is left is gradient noise.
    conditional = (1 / TAU**2 + 1 / S**2) ** -0.5
    torch.testing.assert_close(
        svi.guide.scales.z.detach(), torch.full((N,), conditional), rtol=0.1, atol=0
    )
    assert float(svi.guide.scales.mu.detach()) == pytest.approx(
        (1 / 100 + N / TAU**2) ** -0.5, rel=0.1
    )


@pytest.mark.parametrize("batch_size", [20, 25], ids=["equal", "ragged"])
def test_autodelta_finds_the_joint_mode(batch_size):
    # Of a joint Gaussian, the mode is the mean.
    sgd = partial(torch.optim.SGD, lr=0.01)
    svi = fitted(AutoDelta, batch_size, epochs=300, particles=1, optimizer=sgd)
    (mu, _), (mean, _) = exact()
    assert float((svi.guide.z.detach() - mean).abs().max()) < 0.01
    assert float((svi.guide.mu.detach() - mu).abs()) < 0.01


# -- draws -----------------------------------------------------------------------------------------


def ready(guide=AutoNormal, program=model):
    """A module that has its parameters, all of them different."""
    svi = PyroSVIModule(program, guide, dataset_size=N)
    svi.loss(IndexedBatch(X[:7], torch.arange(7)))
    with torch.no_grad():
        for parameter in svi.guide.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    return svi


def test_draws_have_the_guides_own_marginals():
    svi, rows, count = ready(), torch.tensor([40, 3, 59, 11]), 20_000
    draws = svi.posterior_samples(count, rows=rows)
    assert draws["z"].shape == (count, 4)
    assert draws["mu"].shape == (count,)
    locs, scales = svi.guide.locs, svi.guide.scales
    for name, loc, scale in (
        ("z", locs.z[rows].detach(), scales.z[rows].detach()),
        ("mu", locs.mu.detach(), scales.mu.detach()),
    ):
        # Five standard errors of a mean and of an sd.
        errors = (draws[name].mean(0) - loc).abs() / scale * count**0.5
        assert float(errors.max()) < 5
        ratio = draws[name].std(0) / scale
        assert float((ratio - 1).abs().max()) < 5 / (2 * count) ** 0.5
    correlation = torch.corrcoef(torch.cat([draws["z"], draws["mu"][:, None]], 1).T)
    assert float((correlation - torch.eye(5)).abs().max()) < 5 / count**0.5


def test_draws_without_rows_are_of_globals_alone():
    for guide in (AutoNormal, AutoDelta):
        draws = ready(guide).posterior_samples(3)
        assert {name: draw.shape for name, draw in draws.items()} == {"mu": (3,)}


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_shapes_of_draws(guide):
    def program(x):
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("row.z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-1) + p[..., 0], scale), obs=x)

    svi = ready(guide, program)
    for rows in ([5], range(4), torch.arange(N), torch.tensor([8, 2]).numpy()):
        draws = svi.posterior_samples(6, rows=rows)
        shapes = {"row.z": (3,), "p": (4,), "scale": ()}
        assert draws["w"].shape == (6, 2)
        for name, shape in shapes.items():
            assert draws[name].shape == (6, len(rows), *shape)
            assert not draws[name].requires_grad
    # A point estimate draws its own row, in the order asked for.
    if guide is AutoDelta:
        assert torch.equal(draws["row.z"][0], svi.guide.row.z[[8, 2]])


def test_globals_and_rows_are_of_one_draw():
    class Chained(nn.Module):
        """A global that is the draw of the first row, so that the two tell on each other."""

        def __init__(self):
            super().__init__()
            self.rest = AutoNormal(poutine.block(model, expose=["z"]))

        def forward(self, x):
            z = self.rest(x)["z"]
            pyro.sample("mu", dist.Normal(z[..., 0], 1e-6))

    svi = ready(Chained())
    assert svi._globals_of_data == ("mu",)  # a global that follows the batch is refused else
    svi._globals_of_data = ()
    draws = svi.posterior_samples(50, rows=[4, 9, 30])
    torch.testing.assert_close(draws["mu"], draws["z"][:, 0], rtol=0, atol=1e-4)
    assert len(draws["mu"].unique()) == 50


def test_a_row_that_is_asked_for_twice_has_one_draw():
    draws = ready().posterior_samples(10, rows=[7, 3, 7])["z"]
    assert torch.equal(draws[:, 0], draws[:, 2])
    assert not torch.equal(draws[:, 0], draws[:, 1])


@pytest.mark.parametrize("rows", [[N], [-1, 2], [3, 10**9]])
def test_draws_of_rows_that_do_not_exist(rows):
    with pytest.raises(ValueError, match="out of range: the guide has parameters for rows 0 to 59"):
        ready().posterior_samples(2, rows=rows)


@pytest.mark.parametrize("rows", [[1.5], 3, [[1, 2]], [True, False]])
def test_rows_that_are_no_list_of_numbers(rows):
    with pytest.raises(ValueError, match="rows must be a sequence of integers"):
        ready().posterior_samples(2, rows=rows)


@pytest.mark.parametrize("rows", [[], slice(5, 5), torch.zeros(N, dtype=torch.bool)])
def test_no_rows(rows):
    with pytest.raises(ValueError, match="rows is empty"):
        ready().posterior_samples(2, rows=rows)


@pytest.mark.parametrize(
    "rows, numbers",
    [
        (slice(3, 12, 4), [3, 7, 11]),
        (slice(11, 2, -4), [11, 7, 3]),
        (torch.arange(N) % 20 == 7, [7, 27, 47]),
    ],
    ids=["slice", "backwards", "mask"],
)
def test_rows_by_a_slice_or_a_mask(rows, numbers):
    svi = ready(AutoDelta)
    draws = svi.posterior_samples(2, rows=rows)["z"]
    assert torch.equal(draws[1], svi.guide.z.detach()[numbers])


def amortised(x):
    loc = pyro.param("loc", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc * x, 0.5))


def both_kinds(program):
    guide = AutoGuideList(program)
    guide.append(AutoNormal(poutine.block(program, hide=["z"])))
    guide.append(amortised)
    return guide


@pytest.mark.parametrize("kind", ["amortised", "globals"])
def test_rows_of_a_guide_that_keeps_none(kind):
    def globals_only(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    program = model if kind == "amortised" else globals_only
    svi = PyroSVIModule(
        program, both_kinds(program) if program is model else AutoNormal, dataset_size=N
    )
    svi.loss(X[:4])
    what = (
        "computes 'z' from the data" if kind == "amortised" else "has no latents in the data plate"
    )
    with pytest.raises(ValueError, match=f"parameters of each row.*{what}"):
        svi.posterior_samples(2, rows=[0])
    assert set(svi.posterior_samples(2)) == {"mu"}
