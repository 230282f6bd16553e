"""Draws of latents of rows whose parameters a hand-written guide keeps.

The oracle is the distribution that the known parameters of each row say.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoCallable, AutoGuideList, AutoNormal
from pyro.poutine import block
from support import no_validation, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N, DRAWS = 30, 1000
X = torch.linspace(-1, 2, N)
FIVE = 5 * DRAWS**-0.5
LOC, SCALE = torch.linspace(-3.0, 4.0, N), torch.linspace(0.1, 2.0, N)
EVENT = torch.arange(3.0) + 10 * torch.arange(N)[:, None]
ROWS = [17, 3, 29, 3]


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + w.sum(-1), 0.5), obs=x)


def rows(x):
    with pyro.plate("data", len(x)):
        loc = pyro.param("loc", LOC, event_dim=0)
        scale = pyro.param("scale", SCALE, constraints.positive, event_dim=0)
        z = pyro.sample("z", dist.Normal(loc, scale))
        event = pyro.param("event", EVENT, event_dim=1)
        pyro.sample("w", dist.Normal(event + z[..., None], 0.01).to_event(1))


def by_hand(x):
    pyro.sample("mu", dist.Normal(pyro.param("mu.loc", torch.tensor(0.5)), 0.2))
    rows(x)


def in_list():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, expose=["mu"])))
    guide.append(AutoCallable(model, rows))
    return guide


def ready(guide, count=4, **options):
    svi = PyroSVIModule(model, guide, dataset_size=N, **options)
    svi.loss(IndexedBatch(X[:count], torch.arange(count)))
    return svi


@pytest.mark.parametrize("make", [lambda: by_hand, in_list], ids=["function", "list"])
def test_each_row_has_its_own_distribution(make):
    torch.manual_seed(0)
    svi = ready(make())
    draws = svi.posterior_samples(DRAWS, rows=ROWS)
    assert draws["mu"].shape == (DRAWS,)
    assert draws["z"].shape == (DRAWS, 4) and draws["w"].shape == (DRAWS, 4, 3)
    standard = (draws["z"] - LOC[ROWS]) / SCALE[ROWS]
    # Means have an error of sd / sqrt(draws), variances of sqrt(2) times that.
    assert standard.mean(0).abs().max() < FIVE
    assert (standard.var(0) - 1).abs().max() < FIVE * 2**0.5
    # w follows the draw of its own z, of the same row.
    expected = EVENT[ROWS] + draws["z"][..., None]
    assert (draws["w"] - expected).abs().max() < 0.01 * 6


def test_rows_are_drawn_independently_and_a_row_that_is_asked_for_twice_once():
    torch.manual_seed(1)
    draws = ready(by_hand).posterior_samples(DRAWS, rows=ROWS)["z"]
    assert torch.equal(draws[:, 1], draws[:, 3])
    correlation = torch.corrcoef(draws[:, :3].T) - torch.eye(3)
    assert correlation.abs().max() < FIVE


def test_globals_and_rows_are_of_one_draw():
    def chained(x):
        mu = pyro.sample("mu", dist.Normal(pyro.param("mu.loc", torch.tensor(0.5)), 0.2))
        with pyro.plate("data", len(x)):
            loc = pyro.param("loc", LOC, event_dim=0)
            pyro.sample("z", dist.Normal(loc + mu, 0.001))
            pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    draws = ready(chained).posterior_samples(50, rows=ROWS)
    difference = draws["z"] - draws["mu"][:, None] - LOC[ROWS]
    assert difference.abs().max() < 0.01


def test_more_rows_than_the_first_batch_held_and_fewer():
    svi = ready(by_hand)
    assert svi.posterior_samples(3, rows=range(N))["w"].shape == (3, N, 3)
    assert svi.posterior_samples(3, rows=[5])["w"].shape == (3, 1, 3)


def test_latents_whose_parameters_are_computed_together():
    def guide(x):
        free = pyro.param("free", torch.zeros(2))
        loc, scale = free.tanh(), free.exp()
        pyro.sample("mu", dist.Normal(loc[0], scale[0]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc[1], scale[1]))
            pyro.sample("w", dist.Normal(loc[1].expand(3), scale[1]).to_event(1))

    draws = ready(guide).posterior_samples(3, rows=ROWS)
    assert draws["mu"].shape == (3,) and draws["w"].shape == (3, 4, 3)


def test_latents_that_no_parameter_tells_apart():
    # One distribution of every row, whatever its data.
    def shared(x):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(3.0)), 0.5))
            pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    torch.manual_seed(2)
    draws = ready(shared).posterior_samples(DRAWS, rows=ROWS)["z"]
    assert (draws.mean(0) - 3).abs().max() < 0.5 * FIVE


@no_validation
def test_rows_that_did_not_train_are_refused_after_a_checkpoint_too(tmp_path):
    data = ArrayDataModule(X, batch_size=5, shuffle=False, val=X)
    svi = PyroSVIModule(model, by_hand)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2)
    trainer.fit(svi, datamodule=data)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    fresh, path = PyroSVIModule(model, by_hand), tmp_path / "fit.ckpt"
    quiet_trainer().validate(fresh, datamodule=data, ckpt_path=path, verbose=False)
    for each in (svi, fresh):
        assert each.posterior_samples(2, rows=[0, 9])["z"].shape == (2, 2)
        with pytest.raises(ValueError, match="rows 10 did not train"):
            each.posterior_samples(2, rows=[9, 10])


# -- refused: what the data of a batch tell ----------------------------------------------------


class ZeroEncoder(nn.Module):
    """An encoder whose last layer starts at zero: its first values tell nothing of the data."""

    def __init__(self):
        super().__init__()
        self.out = nn.Parameter(torch.zeros(()))

    def forward(self, x, number=None):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.out * x, 0.5))
            pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def indexed(x, number):
    """Parameters of each row, all equal at first, that the batch's own numbers index."""
    loc = pyro.param("loc", torch.zeros(N))
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[number], 0.5))
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def given(x, number):
    """The same, by the rows of a plate."""
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", N, subsample=number):
        loc = pyro.param("loc", torch.zeros(N), event_dim=0)
        pyro.sample("z", dist.Normal(loc, 0.5))
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


@pytest.mark.parametrize(
    "make", [ZeroEncoder, lambda: indexed, lambda: given], ids=["encoder", "indexed", "given"]
)
def test_latents_that_follow_the_data(make):
    svi = PyroSVIModule(lambda x, number: model(x), make(), dataset_size=N)
    numbers = torch.tensor([7, 2, 11])
    svi.loss(IndexedBatch((X[numbers], numbers), numbers))
    with pytest.raises(ValueError, match="computes 'z' from the data of its batch"):
        svi.posterior_samples(2, rows=[0])


def test_a_global_latent_that_follows_the_data_from_zero():
    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        pyro.sample("mu", dist.Normal(slope * x.mean(), 1.0))
        rows(x)

    with pytest.raises(ValueError, match=r"computes global latents \(mu\)"):
        ready(guide).posterior_samples(2)
