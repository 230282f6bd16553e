"""Every form in which model, guide and batch may come."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule
from support import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule

N, B = 40, 10
X = torch.linspace(-1, 1, N)
Y = 2 * X + 0.5


def model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x + b, 1.0), obs=y)


def rows():
    return DataLoader(TensorDataset(X, Y), batch_size=B)


class Plain(nn.Module):
    def forward(self, x, y):
        return model(x, y)


class Pyroic(PyroModule):
    def forward(self, x, y):
        return model(x, y)


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.3, -0.2]))

    def model(self, x, y):
        return model(x, y)

    def guide(self, x, y):
        pyro.sample("w", dist.Delta(self.loc[0]))
        pyro.sample("b", dist.Delta(self.loc[1]))


class OwnNoise(nn.Module):
    """A module whose method is the model; the log of the noise is its parameter."""

    def __init__(self):
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros(()))

    def model(self, x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x + b, self.log_noise.exp()), obs=y)


def guide_function(x, y):
    pyro.sample("w", dist.Delta(pyro.param("w_loc", torch.tensor(0.3))))
    pyro.sample("b", dist.Delta(pyro.param("b_loc", torch.tensor(-0.2))))


class Subclass(PyroSVIModule):
    def model(self, x, y):
        return model(x, y)

    def guide(self, x, y):
        return guide_function(x, y)


POINT = {"w": 0.3, "b": -0.2}
AT_POINT = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(POINT[site["name"]]))


def expected_loss(x=X[:B], y=Y[:B]):
    """Negative log joint at POINT, the rows scaled to N by hand."""
    prior = sum(dist.Normal(0.0, 1.0).log_prob(torch.tensor(at)) for at in POINT.values())
    rows = dist.Normal(0.3 * x - 0.2, 1.0).log_prob(y).sum()
    return -(prior + N / len(x) * rows)


def two_parts(fn):
    """An AutoGuideList of one guide for each latent."""
    guides = AutoGuideList(fn)
    for name in POINT:
        guides.append(AT_POINT(poutine.block(fn, expose=[name])))
    return guides


def methods():
    both = Methods()
    return both.model, both.guide


FORMS = {
    "function": lambda: (model, AT_POINT),
    "nn.Module": lambda: (Plain(), AT_POINT),
    "PyroModule": lambda: (Pyroic(), AT_POINT),
    "bound methods": methods,
    "bound method and autoguide": lambda: (OwnNoise().model, AT_POINT),
    "guide function": lambda: (model, guide_function),
    "guide instance": lambda: (model, AT_POINT(model)),
    "guide method": lambda: (model, Methods().guide),
    "guide list": lambda: (model, two_parts(model)),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_model_and_guide_gives_the_known_loss_and_trains(form):
    svi = PyroSVIModule(*FORMS[form](), dataset_size=N)
    torch.testing.assert_close(svi.loss((X[:B], Y[:B])), expected_loss())
    before = [p.detach().clone() for p in svi.parameters()]
    quiet_trainer(max_epochs=1).fit(svi, rows())
    assert before
    for old, new in zip(before, svi.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_a_subclass_with_model_and_guide_needs_no_arguments():
    svi = Subclass()
    quiet_trainer(max_epochs=1).fit(svi, rows())
    other = Subclass(dataset_size=N)
    torch.testing.assert_close(other.loss((X[:B], Y[:B])), expected_loss())
    assert len(list(svi.parameters())) == 2


def test_a_subclass_with_a_model_gets_an_autoguide():
    class OwnModel(PyroSVIModule):
        def model(self, x, y):
            return model(x, y)

    assert isinstance(OwnModel().guide, AutoNormal)
    assert isinstance(OwnModel(guide=AutoMultivariateNormal).guide, AutoMultivariateNormal)


@pytest.mark.parametrize("form", FORMS)
def test_model_guide_and_elbo_are_what_was_passed(form):
    fn, guide = FORMS[form]()
    elbo = Trace_ELBO(num_particles=2)
    svi = PyroSVIModule(fn, guide, elbo, dataset_size=N)
    for _ in range(2):
        # Bound methods are equal, not identical: each access of the attribute makes one.
        assert svi.model is fn or svi.model == fn
        assert svi.elbo is elbo
        if isinstance(guide, partial):
            assert type(svi.guide) is guide.func
        else:
            assert svi.guide is guide or svi.guide == guide
        svi.loss((X[:B], Y[:B]))


@pytest.mark.parametrize(
    "batch",
    [
        (X[:B], Y[:B]),
        [X[:B], Y[:B]],
        {"x": X[:B], "y": Y[:B]},
        {"y": Y[:B], "x": X[:B]},
    ],
    ids=["tuple", "list", "dict", "dict in another order"],
)
def test_a_batch_becomes_the_models_arguments(batch):
    svi = PyroSVIModule(model, AT_POINT, dataset_size=N)
    torch.testing.assert_close(svi.loss(batch), expected_loss())


def test_a_tensor_is_one_argument():
    svi = PyroSVIModule(lambda rows: model(*rows.T), AT_POINT, dataset_size=N)
    torch.testing.assert_close(svi.loss(torch.stack([X, Y], 1)[:B]), expected_loss())


class Nested(PyroSVIModule):
    """Batches of another shape: rows are columns, beside a label that the model does not take."""

    def model_inputs(self, batch):
        label, columns = batch
        return (columns[0],), {"y": columns[1]}

    def num_rows(self, batch):
        return batch[1].shape[1]


def test_model_inputs_and_num_rows_override_what_a_batch_means():
    svi = Nested(model, AT_POINT, dataset_size=N)
    batch = ("label", torch.stack([X, Y])[:, :B])
    torch.testing.assert_close(svi.loss(batch), expected_loss())
    assert svi.scale_factor(batch) == N / B
    assert set(svi.posterior_samples(3)) == {"w", "b"}


def test_the_hooks_serve_a_fit():
    svi = Nested(model, AT_POINT, dataset_size=N)
    batches = [("label", torch.stack([x, y])) for x, y in zip(X.split(B), Y.split(B), strict=True)]
    loader = DataLoader(batches, batch_size=None)
    quiet_trainer(max_epochs=1).fit(svi, loader)
    assert float(svi.guide.w.detach()) != pytest.approx(0.3, abs=1e-4)
