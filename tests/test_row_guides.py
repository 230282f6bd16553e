"""Which guides serve latents of each row, however they were made, and which are refused.

The oracle is Pyro's loss on ``plate("data", N, subsample=rows)`` with ``create_plates``.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from support import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule

N, ROWS = 30, torch.tensor([17, 3, 29, 8])
X = torch.linspace(-1, 2, N)


def by_rows(x, rows):
    return pyro.plate("data", N, subsample=rows)


def by_length(x, rows):
    return pyro.plate("data", len(x))


def local(x, rows, plate=by_length):
    mu = pyro.sample("mu", dist.Normal(0.3, 0.5))
    with plate(x, rows):
        z = pyro.sample("z", dist.Normal(mu, 0.8))
        w = pyro.sample("w", dist.Normal(0.0, 0.8))
        pyro.sample("x", dist.Normal(z + w, 0.6), obs=x)


raw = partial(local, plate=by_rows)


def joint_list(model, **options):
    guide = AutoGuideList(model, **options)
    guide.append(AutoMultivariateNormal(poutine.block(model, expose=["mu"])))
    guide.append(AutoNormal(poutine.block(model, hide=["mu"])))
    return guide


def nested_list(model, **options):
    inner = AutoGuideList(poutine.block(model, hide=["mu"]))
    inner.append(AutoDelta(poutine.block(model, expose=["w"])))
    inner.append(AutoNormal(poutine.block(model, expose=["z"])))
    guide = AutoGuideList(model, **options)
    guide.append(inner)
    guide.append(AutoNormal(poutine.block(model, expose=["mu"])))
    return guide


class Amortised(nn.Module):
    """Computes the parameters of ``w`` from its row."""

    def __init__(self, plate):
        super().__init__()
        self.plate = plate
        self.slope = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, rows):
        with self.plate(x, rows):
            pyro.sample("w", dist.Normal(self.slope * x, 0.5))


class Encoder(Amortised):
    """Computes the parameters of both latents of a row."""

    def __init__(self, guide, own):
        super().__init__((lambda x, rows: guide.plates["data"]) if own else by_length)

    def forward(self, x, rows):
        with self.plate(x, rows):
            pyro.sample("z", dist.Normal(self.slope * x, 0.3))
            pyro.sample("w", dist.Normal(self.slope * x, 0.5))


def amortised_list(model, **options):
    guide = AutoGuideList(model, **options)
    guide.append(AutoNormal(poutine.block(model, hide=["w"])))
    # Pyro alone refuses a second plate of one name, and has the list's own plates for that.
    own = "create_plates" in options
    guide.append(Amortised((lambda x, rows: guide.plates["data"]) if own else by_length))
    return guide


class Holder(nn.Module):
    """A hand-written guide of ``mu`` around an autoguide of the rest."""

    def __init__(self, model, **options):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.1))
        self.rest = AutoNormal(poutine.block(model, hide=["mu"]), **options)

    def forward(self, x, rows):
        pyro.sample("mu", dist.Normal(self.loc, 0.2))
        self.rest(x, rows)


GUIDES = {
    "AutoNormal": AutoNormal,
    "partial": partial(AutoDelta, init_loc_fn=pyro.infer.autoguide.init_to_mean),
    "list": joint_list,
    "nested list": nested_list,
    "list with an amortised part": amortised_list,
    "part of a module": Holder,
}


def assert_equal_to_pyro(svi, make_guide, numbered=True):
    def prepared(rows):
        batch = X[rows], rows
        return IndexedBatch(batch, rows) if numbered else batch

    svi.loss(prepared(torch.arange(5)))
    with torch.no_grad():
        for parameter in svi.guide.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    with pyro.settings.context(module_local_params=True):
        guide = make_guide(raw, create_plates=by_rows)
        guide(X[ROWS], ROWS)
        guide.load_state_dict(svi.guide.state_dict())
        torch.manual_seed(3)
        expected = Trace_ELBO().differentiable_loss(raw, guide, X[ROWS], ROWS)
    torch.manual_seed(3)
    loss = svi.loss(prepared(ROWS))
    # Single precision, sums of a few dozen terms.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(loss, list(svi.guide.parameters()))
    wanted = torch.autograd.grad(expected, list(guide.parameters()))
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.to_dense(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guide", [AutoNormal, GUIDES["partial"]], ids=["class", "partial"])
def test_guide_that_is_made_of_the_model(guide):
    assert_equal_to_pyro(PyroSVIModule(local, guide, dataset_size=N), guide)


@pytest.mark.parametrize("form", GUIDES)
def test_instance_that_was_built_on_the_raw_model(form):
    make_guide = GUIDES[form]
    assert_equal_to_pyro(PyroSVIModule(local, make_guide(local), dataset_size=N), make_guide)
    assert_equal_to_pyro(PyroSVIModule(raw, make_guide(raw), dataset_size=N), make_guide)


@pytest.mark.parametrize("form", GUIDES)
def test_instance_with_the_users_own_plates_needs_no_row_numbers(form):
    make_guide = GUIDES[form]
    svi = PyroSVIModule(raw, make_guide(raw, create_plates=by_rows), dataset_size=N)
    assert_equal_to_pyro(svi, make_guide, numbered=False)
    assert_equal_to_pyro(svi, make_guide, numbered=True)


@pytest.mark.parametrize("rows", [ROWS, torch.arange(7)], ids=["equal", "ragged"])
def test_list_whose_latents_of_rows_are_all_computed_from_the_row(rows):
    def make_guide(model, **options):
        guide = AutoGuideList(model, **options)
        guide.append(AutoNormal(poutine.block(model, expose=["mu"])))
        guide.append(Encoder(guide, model is raw))
        return guide

    svi = PyroSVIModule(local, make_guide(local), dataset_size=N)
    svi.loss((X[:5], None))
    with pyro.settings.context(module_local_params=True):
        guide = make_guide(raw, create_plates=by_rows)
        guide(X[ROWS], ROWS)
        guide.load_state_dict(svi.guide.state_dict())
        torch.manual_seed(3)
        expected = Trace_ELBO().differentiable_loss(raw, guide, X[rows], rows)
    torch.manual_seed(3)
    # Single precision, sums of a few dozen terms.
    torch.testing.assert_close(svi.loss((X[rows], None)), expected, rtol=1e-5, atol=0)


def test_fit_with_the_users_own_plates_from_plain_batches():
    svi = PyroSVIModule(raw, AutoNormal(raw, create_plates=by_rows))
    loader = DataLoader(TensorDataset(X, torch.arange(N)), batch_size=8, shuffle=True)
    quiet_trainer(max_epochs=60).fit(svi, loader)
    z = svi.guide.median()["z"]
    assert float(torch.corrcoef(torch.stack([z, X]))[0, 1]) > 0.9  # 0.0 if rows were mixed up
    draws = svi.posterior_samples(5, rows=[4, 1, 7])
    assert draws["z"].shape == (5, 3)
    assert set(svi.posterior_samples(5)) == {"mu"}


def test_own_plates_that_disagree_with_the_row_numbers():
    svi = PyroSVIModule(raw, AutoNormal(raw, create_plates=by_rows), dataset_size=N)
    svi.loss((X[ROWS], ROWS))
    with pytest.raises(ValueError, match="create_plates gives plate 'data' other rows"):
        svi.loss(IndexedBatch((X[ROWS], ROWS), ROWS.flip(0)))


def test_create_plates_is_the_users_again_after_a_run():
    guide = AutoNormal(raw, create_plates=by_rows)
    plain = AutoNormal(local)
    PyroSVIModule(raw, guide, dataset_size=N).loss((X[ROWS], ROWS))
    PyroSVIModule(local, plain, dataset_size=N).loss(IndexedBatch((X[ROWS], ROWS), ROWS))
    assert guide.create_plates is by_rows
    assert plain.create_plates is None


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_guide_that_is_run_by_hand_has_all_rows(guide):
    # Pyro's own plates of the first batch's size would give that many rows, drawn at random.
    svi = PyroSVIModule(local, guide, dataset_size=N)
    svi.loss(IndexedBatch((X[ROWS], ROWS), ROWS))
    with torch.no_grad():
        table = (svi.guide.locs if guide is AutoNormal else svi.guide).z.copy_(X)
    with pyro.settings.context(module_local_params=True):
        assert torch.equal(svi.guide.median()["z"], table)
        assert svi.guide()["z"].shape == (N,)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_guide_that_has_run_on_another_number_of_rows(guide):
    with pyro.settings.context(module_local_params=True):
        ran = guide(local)
        ran(X[:5], None)
    svi = PyroSVIModule(local, ran, dataset_size=N)
    with pytest.raises(ValueError, match=r"parameters for 5 rows.*but there are 30"):
        svi.loss(IndexedBatch((X[ROWS], ROWS), ROWS))
    with pytest.raises(ValueError, match=r"parameters for 5 rows.*but there are 30"):
        arrays = (X, torch.arange(N))
        data = ArrayDataModule(arrays)
        quiet_trainer(max_epochs=1).fit(PyroSVIModule(local, ran), datamodule=data)


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_support_that_differs_between_rows(guide):
    # The guide's transform would keep the bounds of the first batch.
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, x + 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    with pytest.raises(ValueError, match=r"support of latent site 'z' has bounds for each row"):
        svi.loss(IndexedBatch(X[ROWS], ROWS))


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_support_of_fixed_bounds_at_any_batch_size(guide):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.tensor([-2.0, 0.0]), 4.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    for rows in (ROWS, ROWS[:1], torch.arange(9)):
        svi.loss(IndexedBatch(X[rows], rows))
    z = svi.posterior_samples(3, rows=[0, 20])["z"]
    assert z.shape == (3, 2, 2)
    assert ((z > torch.tensor([-2.0, 0.0])) & (z < 4.0)).all()


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_one_value_in_a_plate_without_a_size(guide):
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    with pytest.raises(ValueError, match=r"'z' has one value for all rows.*'data'"):
        svi.loss(IndexedBatch(X[ROWS], ROWS))
