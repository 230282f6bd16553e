"""Draws of the global latents: their shapes, and the distribution that the guide says."""

import gc
import weakref
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from support import quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, G, DRAWS = 30, 4, 20_000
X = torch.linspace(-2, 2, N)
# Five standard errors of a mean, and of a sd, of independent draws.
FIVE = 5 * DRAWS**-0.5

SHAPES = {"scalar": (), "vector": (3,), "groups": (G,), "matrix": (2, 3), "each": (G, 2)}


def model(x):
    """Global latents of every shape: scalar, event, plate, and both."""
    scalar = pyro.sample("scalar", dist.Normal(0.0, 1.0))
    vector = pyro.sample("vector", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    matrix = pyro.sample("matrix", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("group", G):
        groups = pyro.sample("groups", dist.Normal(scalar, 1.0))
        each = pyro.sample("each", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    level = scalar + vector.sum(-1) + matrix.sum((-1, -2)) + groups.sum(-1) + each.sum((-1, -2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(level, 1.0), obs=x)


def scattered(svi):
    """Make the guide's parameters and move each of them somewhere else."""
    svi.loss(X)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in svi.guide.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return svi


def flat(draws):
    """All latents of a draw in one row, in the order of SHAPES."""
    return torch.cat([draws[name].reshape(len(draws[name]), -1) for name in SHAPES], 1)


def test_draws_of_an_autonormal_have_its_locs_and_scales():
    svi = scattered(PyroSVIModule(model, AutoNormal, dataset_size=N))
    torch.manual_seed(0)
    draws = svi.posterior_samples(DRAWS)
    for name in SHAPES:
        loc, scale = (getattr(part, name).detach() for part in (svi.guide.locs, svi.guide.scales))
        z = (draws[name] - loc) / scale
        assert z.shape == (DRAWS, *SHAPES[name])
        assert z.mean(0).abs().max() < FIVE
        assert (z.std(0) - 1).abs().max() < FIVE


@pytest.mark.parametrize(
    "guide",
    [AutoDiagonalNormal, AutoMultivariateNormal, partial(AutoLowRankMultivariateNormal, rank=2)],
    ids=["diagonal", "multivariate", "low rank"],
)
def test_draws_of_a_joint_normal_have_its_mean_and_covariance(guide):
    svi = scattered(PyroSVIModule(model, guide, dataset_size=N))
    torch.manual_seed(0)
    draws = svi.posterior_samples(DRAWS)
    assert {name: tuple(d.shape[1:]) for name, d in draws.items()} == SHAPES
    joint = svi.guide.get_posterior()
    # The vector of the guide holds the sites in the model's order.
    order = ["scalar", "vector", "matrix", "groups", "each"]
    values = torch.cat([draws[name].reshape(DRAWS, -1) for name in order], 1)
    with torch.no_grad():
        if isinstance(joint, dist.Independent):
            covariance = joint.variance.diag()
        else:
            covariance = joint.covariance_matrix
        sd = covariance.diag().sqrt()
        assert (((values - joint.mean).mean(0)) / sd).abs().max() < FIVE
        # A sample correlation has a standard error of at most sqrt(2 / DRAWS), its scale included.
        found = values.T.cov() / sd / sd[:, None]
        assert (found - covariance / sd / sd[:, None]).abs().max() < 2**0.5 * FIVE


STRUCTURED = partial(
    AutoStructured,
    conditionals=dict.fromkeys(SHAPES, "normal"),
    dependencies={"groups": {"scalar": "linear"}},
)


@pytest.mark.parametrize(
    "guide", [partial(AutoIAFNormal, hidden_dim=[30]), STRUCTURED], ids=["flow", "structured"]
)
def test_draws_of_other_autoguides_are_those_of_one_run_each(guide):
    torch.manual_seed(2)
    svi = scattered(PyroSVIModule(model, guide, dataset_size=N))
    torch.manual_seed(0)
    draws = svi.posterior_samples(2000)
    assert {name: tuple(d.shape[1:]) for name, d in draws.items()} == SHAPES
    with torch.no_grad(), pyro.settings.context(module_local_params=True):
        runs = [svi.guide(X) for _ in range(2000)]
    single = {name: torch.stack([run[name] for run in runs]) for name in SHAPES}
    ours, theirs = flat(draws), flat(single)
    # Five standard errors of the difference of two means, and of two correlations.
    limit = 5 * (2 / 2000) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)) / theirs.std(0)).abs().max() < limit
    assert (ours.std(0) / theirs.std(0) - 1).abs().max() < 2 * limit
    assert (ours.T.corrcoef() - theirs.T.corrcoef()).abs().max() < limit


def test_draws_of_a_point_estimate_are_the_point():
    svi = scattered(PyroSVIModule(model, AutoDelta, dataset_size=N))
    draws = svi.posterior_samples(3)
    for name, shape in SHAPES.items():
        assert torch.equal(draws[name], getattr(svi.guide, name).detach().expand(3, *shape))


RANDOM_GUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    partial(AutoIAFNormal, hidden_dim=[30]),
    STRUCTURED,
]


def name_of(guide):
    return getattr(guide, "func", guide).__name__


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("guide", [AutoDelta, *RANDOM_GUIDES], ids=name_of)
def test_draws_need_no_gradient_and_do_not_follow_the_parameters(guide, count):
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(X)
    draws = svi.posterior_samples(count)
    kept = {name: d.clone() for name, d in draws.items()}
    scattered(svi)
    assert not any(d.requires_grad for d in draws.values())
    assert all(torch.equal(d, kept[name]) for name, d in draws.items())


@pytest.mark.parametrize("guide", RANDOM_GUIDES, ids=name_of)
def test_each_draw_is_another(guide):
    svi = scattered(PyroSVIModule(model, guide, dataset_size=N))
    assert len(flat(svi.posterior_samples(50)).unique(dim=0)) == 50
    assert len(svi.posterior_samples(50)["groups"].flatten().unique()) == 50 * G


def constrained(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mix[..., 0] + share, scale), obs=x)


def test_draws_of_constrained_sites_lie_in_their_support():
    svi = scattered(PyroSVIModule(constrained, AutoNormal, dataset_size=N))
    torch.manual_seed(0)
    draws = svi.posterior_samples(DRAWS)
    assert draws["scale"].shape == draws["share"].shape == (DRAWS,)
    assert draws["mix"].shape == (DRAWS, 3)
    torch.testing.assert_close(draws["mix"].sum(-1), torch.ones(DRAWS))
    assert draws["mix"].min() > 0
    locs, scales = svi.guide.locs, svi.guide.scales
    for name, unconstrain in (("scale", torch.log), ("share", torch.logit)):
        loc, scale = getattr(locs, name).detach(), getattr(scales, name).detach()
        z = (unconstrain(draws[name]) - loc) / scale
        assert z.mean().abs() < FIVE
        assert (z.std() - 1).abs() < FIVE


def with_local(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("group", G):
        pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Amortised(nn.Module):
    """A hand-written guide: two global latents and one of each row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        pyro.sample("mu", dist.Normal(1.5, 0.25))
        with pyro.plate("group", G):
            pyro.sample("level", dist.Normal(torch.arange(float(G)), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.weight * x, 1.0))


class Joined(nn.Module):
    """An autoguide of the global latents, called by a hand-written guide of the others."""

    def __init__(self):
        super().__init__()
        exposed = poutine.block(with_local, expose=["mu", "level"])
        self.globals = AutoNormal(exposed, init_scale=0.5)
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        self.globals(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.weight * x, 1.0))


def listed():
    """The same as an AutoGuideList, which makes the plates that its parts share."""
    plates = partial(pyro.plate, "data", dim=-1)
    guide = AutoGuideList(with_local, create_plates=lambda x: plates(size=len(x)))
    guide.append(AutoNormal(poutine.block(with_local, expose=["mu", "level"]), init_scale=0.5))

    def local(x):
        weight = pyro.param("weight", torch.tensor(0.5))
        with guide.plates["data"]:
            return {"z": pyro.sample("z", dist.Normal(weight * x, 1.0))}

    guide.append(local)
    return guide


def test_a_handwritten_guide_gives_its_global_latents_alone():
    svi = PyroSVIModule(with_local, Amortised(), dataset_size=N)
    svi.loss(X)
    torch.manual_seed(0)
    draws = svi.posterior_samples(2000)
    assert {name: d.shape for name, d in draws.items()} == {"mu": (2000,), "level": (2000, G)}
    limit = 5 * 2000**-0.5
    assert ((draws["mu"] - 1.5) / 0.25).mean().abs() < limit
    assert (draws["mu"].std() / 0.25 - 1).abs() < limit
    assert ((draws["level"] - torch.arange(G)) / 0.5).mean(0).abs().max() < limit
    assert not draws["mu"].requires_grad
    assert len(draws["level"].unique()) > 0.99 * 2000 * G


@pytest.mark.parametrize("guide", [Joined, listed])
def test_an_autoguide_joined_to_an_amortised_part_gives_the_global_latents(guide):
    svi = PyroSVIModule(with_local, guide(), optimizer=partial(torch.optim.SGD, lr=1e-9))
    # The last batch is smaller.
    quiet_trainer(max_epochs=1).fit(svi, datamodule=ArrayDataModule(X, batch_size=8))
    torch.manual_seed(0)
    draws = svi.posterior_samples(2000)
    assert {name: d.shape for name, d in draws.items()} == {"mu": (2000,), "level": (2000, G)}
    assert (draws["mu"].std() / 0.5 - 1).abs() < 5 * 2000**-0.5


def test_draws_need_no_data():
    data = X.clone()
    alive = weakref.ref(data)
    svi = PyroSVIModule(model)
    quiet_trainer(max_epochs=1).fit(svi, datamodule=ArrayDataModule(data, batch_size=10))
    svi.trainer = None  # it holds the datamodule
    del data
    gc.collect()
    assert alive() is None
    assert svi.posterior_samples(2)["groups"].shape == (2, G)


def test_draws_before_any_parameter_exists_are_refused():
    with pytest.raises(RuntimeError, match="no parameters yet"):
        PyroSVIModule(model, dataset_size=N).posterior_samples(2)


@pytest.mark.parametrize("count", [0, -1])
def test_a_number_of_draws_below_one_is_refused(count):
    svi = scattered(PyroSVIModule(model, dataset_size=N))
    with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {count}"):
        svi.posterior_samples(count)
