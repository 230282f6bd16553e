"""A module made of a checkpoint is the module that was saved, with no data and no Trainer."""

import copy
from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from checkpoint_support import assert_equal_draws, load_into, move, save, seeded
from compiled_models import CASES, B, N, regression_batch, values_batch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from support import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Subset

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule

pytestmark = [
    pytest.mark.usefixtures("untouched_store"),
    pytest.mark.filterwarnings("ignore:The `random_module` primitive is deprecated"),
]


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def assert_same(loaded, svi, batch):
    on = {"batch": batch} if svi._globals_of_data else {}
    assert_equal_draws(loaded, svi, **on)
    assert_equal_draws(loaded, svi, batch=batch)
    with torch.no_grad():  # as in validation
        assert torch.equal(*(seeded(lambda m=m: m.loss(batch)) for m in (loaded, svi)))
    assert torch.equal(*(seeded(lambda m=m: m.loss(batch)) for m in (loaded, svi)))


def of(model, guide=AutoNormal, **options):
    return lambda: PyroSVIModule(model, guide, dataset_size=N, **options)


@pytest.mark.parametrize("name", CASES)
def test_draws_and_losses_are_those_of_the_saved_module(name, tmp_path):
    case = CASES[name]
    svi = case.make()
    svi.loss(case.batch(0))
    move(svi)
    loaded = load_into(case.make(), save(svi, tmp_path / "fit.ckpt"))
    for options in ({}, {"rows": [0, 5, 5]}):
        assert answer(loaded, **options) == answer(svi, **options)
    assert_same(loaded, svi, case.batch(1))


def answer(svi, **options):
    """Draws, or why there are none."""
    try:
        draws = seeded(lambda: svi.posterior_samples(2, **options))
    except ValueError as error:
        return str(error)
    return {name: value.tolist() for name, value in draws.items()}


# -- more guides and models ------------------------------------------------------------------------


def discrete():
    def model(x, y):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(k.float(), 1.0), obs=y)

    return PyroSVIModule(model, AutoDiscreteParallel, TraceEnum_ELBO(), dataset_size=N)


def drawn_network():
    net = nn.Linear(3, 1)
    priors = {"weight": dist.Normal(torch.zeros(1, 3), 1.0).to_event(2)}

    def model(x, y):
        loc = pyro.random_module("bnn", net, priors)()(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc[:, 0], 0.5), obs=y)

    return PyroSVIModule(model, dataset_size=N)


def lazy():
    net = nn.LazyLinear(1)

    def model(x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] + bias, 1.0), obs=y)

    return PyroSVIModule(model, dataset_size=N)


def nn_regression():
    net = nn.Linear(3, 1)

    def model(x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] + bias, 1.0), obs=y)

    return model


def fixed_batches(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", N, subsample_size=B):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def neighbours(x, y):
    """A model that needs five rows."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x[4, 0], 1.0), obs=y)


def different_rows(x, y):
    """A model that needs three rows that differ."""
    if len(x.unique(dim=0)) < 3:
        raise ValueError("not enough rows that differ")
    neighbours(x, y)


def own_plates():
    """An autoguide of rows that is told which by its user."""

    def model(x, rows):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", N, subsample=rows):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def plates(x, rows):
        return pyro.plate("data", N, subsample=rows)

    return PyroSVIModule(model, AutoNormal(model, create_plates=plates), dataset_size=N)


def numbered_values(seed):
    generator = torch.Generator().manual_seed(seed)
    return values_batch(seed)[0], torch.randperm(N, generator=generator)[:B]


def guides_in_guides():
    guide = AutoGuideList(regression)
    guide.append(AutoGaussian(poutine.block(regression, expose=["w"])))

    def sigma(x, y):
        pyro.sample("sigma", dist.LogNormal(pyro.param("s", torch.tensor(0.1)), 0.1))

    guide.append(sigma)
    return PyroSVIModule(regression, guide, dataset_size=N)


def missing(x, there):
    """Latents with a mask, in which nothing depends on what is left out."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=there)


def missing_guide(x, there):
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.2)), 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x_unobserved", dist.Normal(0.3 * x, 0.5))


def masked_values(seed):
    x = values_batch(seed)[0]
    return x, torch.arange(len(x)) % 3 != seed % 3


class OfBatch(nn.Module):
    """A guide that computes a latent of all rows from its batch."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)

    def forward(self, x, y):
        pyro.sample("w", dist.Normal(self.net(x).mean(0), 0.1).to_event(1))
        pyro.sample("sigma", dist.LogNormal(0.0, 0.1))


FORMS = {
    "latent of all rows from a batch": (lambda: of(regression, OfBatch())(), regression_batch),
    "AutoGaussian": (of(regression, AutoGaussian), regression_batch),
    "AutoStructured": (of(regression, AutoStructured), regression_batch),
    "AutoDiscreteParallel": (discrete, regression_batch),
    "AutoGuideList with a function": (guides_in_guides, regression_batch),
    "random_module": (drawn_network, regression_batch),
    "lazy layer": (lazy, regression_batch),
    "fixed batch size": (of(fixed_batches), regression_batch),
    "five rows needed": (of(neighbours), regression_batch),
    "three different rows needed": (of(different_rows), regression_batch),
    "create_plates": (own_plates, numbered_values),
    "masked latents": (of(missing, missing_guide), masked_values),
    "no data plate": (
        of(lambda x, y: pyro.factor("f", x.mean() * pyro.sample("a", dist.Normal(0.0, 1.0))),
           data_plate=None, checks=False),
        regression_batch,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_guide_and_model(name, tmp_path):
    make, batch = FORMS[name]
    svi = make()
    svi.loss(batch(0))
    move(svi)
    loaded = load_into(make(), save(svi, tmp_path / "fit.ckpt"))
    assert answer(loaded) == answer(svi)
    assert_same(loaded, svi, batch(1))


def test_a_mask_that_the_guide_follows_is_followed_after_loading(tmp_path):
    make, batch = FORMS["masked latents"]
    svi = make()
    svi.loss(batch(0))
    loaded = load_into(make(), save(svi, tmp_path / "fit.ckpt"))
    assert dict(loaded._masks) == {"x_unobserved": "carried"}


# -- batches of other kinds ------------------------------------------------------------------------


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class OfPairs(PyroSVIModule):
    """Batches are named tuples within a dict, with what is no tensor beside them."""

    def __init__(self):
        super().__init__(guide=AutoMultivariateNormal, dataset_size=N)

    def model_inputs(self, batch):
        pair, names = batch["pair"], batch["names"]
        # No assert: what pytest makes of one would be looked through for networks.
        if not isinstance(pair, Pair) or batch["unit"] != "cm" or len(names) != len(pair.x):
            raise TypeError("not the batch of this loader")
        return (pair.x, pair.y * batch["factor"]), {}

    def model(self, x, y):
        regression(x, y)


def pairs(seed):
    names = [f"row {number}" for number in range(B)]
    pair = Pair(*regression_batch(seed))
    return {"pair": pair, "unit": "cm", "factor": 2.0, "names": names, "nothing": None}


def test_named_tuples_strings_and_numbers_of_a_batch_come_back(tmp_path):
    svi = OfPairs()
    svi.loss(pairs(0))
    move(svi)
    loaded = OfPairs.load_from_checkpoint(save(svi, tmp_path / "fit.ckpt"))
    assert_same(loaded, svi, pairs(1))


class CountsBy(PyroSVIModule):
    """Rows are counted by the user, and none may be cut off: each has two entries."""

    def num_rows(self, batch):
        return len(batch[0]) // 2

    def model(self, x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x) // 2):
            loc = (x @ w).reshape(-1, 2)
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y.reshape(-1, 2))


def test_where_rows_are_counted_by_the_user_the_example_is_the_whole_batch(tmp_path):
    svi = CountsBy(dataset_size=N)
    svi.loss(regression_batch(0))
    move(svi)
    loaded = CountsBy.load_from_checkpoint(save(svi, tmp_path / "fit.ckpt"))
    assert len(loaded._prototype[0]) == B
    assert_same(loaded, svi, regression_batch(1))


# -- subclasses and arguments ----------------------------------------------------------------------


class Plain(PyroSVIModule):
    def __init__(self, width=2, lr=0.1, names=("a", "b")):
        super().__init__(optimizer=partial(torch.optim.Adam, lr=lr))
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def model(self, x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x)[:, 0] + bias, 1.0), obs=y)


def rows():
    return ArrayDataModule(regression_batch(0, N), batch_size=B, val_split=0.2)


def fit(svi, data=None, **flags):
    trainer = quiet_trainer(**{"max_epochs": 1, **flags})
    torch.manual_seed(3)
    trainer.fit(svi, datamodule=data or rows())
    return trainer


def test_a_subclass_that_saves_plain_arguments_needs_none(tmp_path):
    svi = Plain(width=5, lr=0.05)
    fit(svi).save_checkpoint(tmp_path / "fit.ckpt")
    loaded = Plain.load_from_checkpoint(tmp_path / "fit.ckpt")
    assert dict(loaded.hparams) == {"width": 5, "lr": 0.05, "names": ("a", "b")}
    assert_same(loaded, svi, regression_batch(1))


def test_the_size_of_the_training_set_is_known_unless_another_is_stated(tmp_path):
    svi = PyroSVIModule(regression)
    fit(svi).save_checkpoint(tmp_path / "fit.ckpt")
    load = partial(PyroSVIModule.load_from_checkpoint, tmp_path / "fit.ckpt", model=regression)
    assert load().dataset_size == 0.8 * N
    assert load(dataset_size=1000).dataset_size == 1000


def test_a_network_that_is_handed_over_gets_the_weights(tmp_path):
    torch.manual_seed(0)
    svi, net = CASES["latent weights"].make(), CASES["latent weights"].make().model
    svi.loss(regression_batch(0))
    move(svi)
    PyroSVIModule.load_from_checkpoint(save(svi, tmp_path / "fit.ckpt"), model=net)
    assert torch.equal(net.log_sigma, svi.model.log_sigma)


@pytest.mark.parametrize("made_of", [{}, {"model": regression}], ids=["subclass", "function"])
def test_a_module_of_double_precision_is_double_again(made_of, tmp_path):
    kind = PyroSVIModule if made_of else Plain
    svi = kind(**made_of)
    fit(svi, precision="64-true").save_checkpoint(tmp_path / "fit.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "fit.ckpt", **made_of)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float64}
    assert_equal_draws(loaded, svi)
    assert torch.get_default_dtype() == torch.float32


def test_a_module_that_was_made_double_after_its_first_batch_is_double_again(tmp_path):
    svi = PyroSVIModule(nn_regression(), dataset_size=N)
    svi.loss(regression_batch(0))
    move(svi.double())
    loaded = PyroSVIModule.load_from_checkpoint(
        save(svi, tmp_path / "fit.ckpt"), model=nn_regression()
    )
    batch = tuple(column.double() for column in regression_batch(1))
    assert_same(loaded, svi, batch)


def test_loading_leaves_random_states_as_they_were(tmp_path):
    svi = CASES["AutoNormal"].make()
    svi.loss(regression_batch(0))
    path, fresh = save(svi, tmp_path / "fit.ckpt"), CASES["AutoNormal"].make()
    before = torch.get_rng_state()
    load_into(fresh, path)
    assert torch.equal(torch.get_rng_state(), before)


# -- what comes after ------------------------------------------------------------------------------


class OfRows(PyroSVIModule):
    def model(self, x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize("kind", [Plain, OfRows])
def test_a_loaded_module_trains_on_as_a_copy_of_the_saved_one_does(kind, tmp_path):
    svi = kind()
    fit(svi).save_checkpoint(tmp_path / "fit.ckpt")
    loaded, copied = kind.load_from_checkpoint(tmp_path / "fit.ckpt"), copy.deepcopy(svi)
    for module in (loaded, copied):
        fit(module, max_epochs=2)
    for name, value in copied.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
        assert not torch.equal(value, svi.state_dict()[name])


def test_a_loaded_module_validates_without_a_fit(tmp_path):
    svi = Plain()
    fit(svi).save_checkpoint(tmp_path / "fit.ckpt")
    held_out = DataLoader(list(zip(*regression_batch(5), strict=True)))
    figures = []
    for module in (svi, Plain.load_from_checkpoint(tmp_path / "fit.ckpt")):
        torch.manual_seed(0)
        figures += quiet_trainer().validate(module, held_out, verbose=False)
    assert figures[0] == figures[1]


class Predicts(Plain):
    def predict_step(self, batch):
        return seeded(lambda: self.posterior_samples(2))["bias"]


def test_a_fresh_module_predicts_from_a_checkpoint(tmp_path):
    svi = Predicts()
    fit(svi).save_checkpoint(tmp_path / "fit.ckpt")
    loader = DataLoader(list(zip(*regression_batch(5), strict=True)), batch_size=B)
    found = quiet_trainer().predict(Predicts(), loader, ckpt_path=tmp_path / "fit.ckpt")
    assert torch.equal(found[0], svi.predict_step(None))


def test_rows_that_trained_can_be_drawn_and_others_cannot(tmp_path):
    def latents(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    data, kept = IndexedDataset(values_batch(0, N)[0]), [1, 3, 30]
    svi = PyroSVIModule(latents)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(svi, DataLoader(Subset(data, kept), batch_size=2))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    loaded = PyroSVIModule.load_from_checkpoint(tmp_path / "fit.ckpt", model=latents)
    assert loaded.dataset_size == len(kept)
    assert_equal_draws(loaded, svi, rows=kept)
    with pytest.raises(ValueError, match="rows 2 did not train"):
        loaded.posterior_samples(1, rows=[2])


def test_a_training_batch_is_checked_though_the_example_was_not(tmp_path):
    svi = PyroSVIModule(regression)
    fit(svi).save_checkpoint(tmp_path / "fit.ckpt")

    def counts_rows(x, y):
        regression(x, y)
        pyro.factor("sum", -y.square().sum())

    def optimizer(parameters):
        raise AssertionError("the batch is checked before")

    load = partial(
        PyroSVIModule.load_from_checkpoint,
        tmp_path / "fit.ckpt",
        model=counts_rows,
        optimizer=optimizer,
    )
    load().posterior_samples(1)
    with pytest.raises(ValueError, match="site 'sum'.*grows with the batch"):
        fit(load())
    with pytest.raises(ValueError, match="site 'sum'.*grows with the batch"):
        load().loss(regression_batch(0))
