"""A checkpoint of other data, or of another model or guide, is refused and says how it differs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from checkpoint_support import assert_equal_draws, move, save
from compiled_models import columns
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule
from support import normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Subset

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule

N, B = 40, 10
X = torch.randn(60, generator=torch.Generator().manual_seed(0))


def data(size=N, **options):
    return ArrayDataModule(X[:size], batch_size=B, **options)


def fit(svi, rows=None, ckpt_path=None, max_epochs=1):
    trainer = quiet_trainer(max_epochs=max_epochs)
    rows = data() if rows is None else rows
    name = "datamodule" if isinstance(rows, ArrayDataModule) else "train_dataloaders"
    trainer.fit(svi, **{name: rows}, ckpt_path=ckpt_path)
    return trainer


def resume(svi, rows, path):
    return fit(svi, rows, path, max_epochs=2)


def latents_of_rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# -- other data ------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    fit(PyroSVIModule(normal_mean)).save_checkpoint(tmp_path / "fit.ckpt")
    return tmp_path / "fit.ckpt"


def test_a_fit_is_not_resumed_on_data_of_another_size(path):
    with pytest.raises(ValueError, match="N = 40 rows, and the training set has 30.*_size=30"):
        resume(PyroSVIModule(normal_mean), data(30), path)


def test_a_fit_is_resumed_on_data_of_another_size_where_that_is_stated(path):
    svi = PyroSVIModule(normal_mean, dataset_size=30)
    assert resume(svi, data(30), path).global_step == 7
    assert svi.dataset_size == 30


def test_a_new_fit_of_loaded_weights_takes_data_of_any_size(path):
    svi = PyroSVIModule.load_from_checkpoint(path, model=normal_mean)
    fit(svi, data(30))
    assert svi.dataset_size == 30


@pytest.mark.parametrize("use", ["validate", "test"])
def test_an_evaluation_takes_n_of_the_checkpoint(use, path):
    svi = PyroSVIModule(normal_mean)
    evaluate = getattr(quiet_trainer(), use)
    figures = evaluate(svi, DataLoader(X[40:], batch_size=20), ckpt_path=path, verbose=False)
    (whole, per_row) = figures[0].values()
    assert svi.dataset_size == N
    assert whole == pytest.approx(N * per_row, rel=1e-6)  # single precision


def test_n_of_the_checkpoint_is_known_better_than_that_of_other_data(path):
    svi = PyroSVIModule(normal_mean)
    others = data(60, val_split=0.5)
    quiet_trainer().validate(svi, datamodule=others, ckpt_path=path, verbose=False)
    assert (svi.dataset_size, others.dataset_size) == (N, 30)


def test_an_evaluation_keeps_the_n_that_is_stated(path):
    svi = PyroSVIModule(normal_mean, dataset_size=1000)
    quiet_trainer().validate(svi, DataLoader(X[40:]), ckpt_path=path, verbose=False)
    assert svi.dataset_size == 1000


def test_an_evaluation_without_checkpoint_is_refused_without_n():
    with pytest.raises(ValueError, match="never taken from validation or test data"):
        quiet_trainer().test(PyroSVIModule(normal_mean), DataLoader(X[40:]), verbose=False)


def test_a_fit_of_rows_is_not_resumed_where_another_number_of_rows_has_a_number(tmp_path):
    def loader(size):  # of which the same 10 train
        return DataLoader(Subset(IndexedDataset(X[:size]), range(10)), batch_size=5)

    fit(PyroSVIModule(latents_of_rows), loader(20)).save_checkpoint(tmp_path / "fit.ckpt")
    with pytest.raises(ValueError, match="parameters for 20 rows, and 30 rows of the training"):
        resume(PyroSVIModule(latents_of_rows), loader(30), tmp_path / "fit.ckpt")
    resume(PyroSVIModule(latents_of_rows), loader(20), tmp_path / "fit.ckpt")


# -- other plates ----------------------------------------------------------------------------------


def renamed(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
    with pyro.plate("observations", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def test_other_plates_are_refused_as_the_module_is_loaded_and_as_it_is_resumed(path):
    named = {"data_plate": "observations"}
    differ = {"match": "of data_plate='data', and this module has 'observations'"}
    with pytest.raises(ValueError, **differ):
        PyroSVIModule.load_from_checkpoint(path, model=renamed, **named)
    with pytest.raises(ValueError, **differ):
        resume(PyroSVIModule(renamed, **named), data(), path)


@pytest.mark.parametrize("plates", ["users", {"users": None, "items": 7}, None])
def test_other_columns_are_refused(plates, tmp_path):
    size = {"users": None, "items": 6}
    svi = PyroSVIModule(columns, data_plate=size, dataset_size=N)
    svi.loss(torch.ones(B, 6))
    save(svi, tmp_path / "fit.ckpt")
    with pytest.raises(ValueError, match="give it data_plate={'users': None, 'items': 6}"):
        PyroSVIModule.load_from_checkpoint(tmp_path / "fit.ckpt", model=columns, data_plate=plates)


# -- another model or guide ------------------------------------------------------------------------


def model_of(**priors):
    """A model with a latent of each name, of a shape."""

    def model(x):
        total = 0.0
        for name, shape in priors.items():
            prior = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
            total = total + pyro.sample(name, prior).sum()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    return model


def of(model, guide=AutoNormal):
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(X[:B])
    move(svi)
    return svi


class Net(PyroModule):
    def __init__(self, width=2, extra=False):
        super().__init__()
        self.net = nn.Linear(1, width)
        if extra:
            self.other = nn.Linear(1, 1)

    def forward(self, x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        loc = self.net(x[:, None]).sum(-1) + a
        if hasattr(self, "other"):
            loc = loc + self.other(x[:, None])[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def by_hand(name, size=()):
    def guide(x):
        pyro.sample("a", dist.Normal(pyro.param(name, torch.zeros(size)).sum(), 0.1))

    return guide


SMALL = model_of(a=(), b=(2,))
ANOTHER = {
    "sites": (
        (SMALL, AutoNormal),
        (model_of(a=(), c=(3,)), AutoNormal),
        r"missing latent sites: c \(3,\)\n  unexpected latent sites: b \(2,\)"
        r"\n  missing parameters: guide.locs.c, guide.scales.c"
        r"\n  unexpected parameters: guide.locs.b, guide.scales.b\n",
    ),
    "sites in a vector of the same length": (
        (SMALL, AutoMultivariateNormal),
        (model_of(c=(3,)), AutoMultivariateNormal),
        r"missing latent sites: c \(3,\)\n  unexpected latent sites: a \(\), b \(2,\)\n",
    ),
    "order of sites in a vector": (
        (SMALL, AutoDiagonalNormal),
        (model_of(b=(2,), a=()), AutoDiagonalNormal),
        r"in another order, which is that of one vector of all: a, b there, b, a here",
    ),
    "shape": (
        (SMALL, AutoDelta),
        (model_of(a=(), b=(4,)), AutoDelta),
        r"latent sites of another shape: b \(2,\) there, \(4,\) here"
        r"\n  parameters of another shape: guide.b \(2,\) there, \(4,\) here",
    ),
    "guide": (
        (SMALL, AutoNormal),
        (SMALL, AutoDelta),
        r"missing parameters: guide.a, guide.b\n  unexpected parameters: guide.locs.a, ",
    ),
    "guide of fewer parameters": (
        (SMALL, AutoMultivariateNormal),
        (SMALL, AutoDiagonalNormal),
        r"unexpected parameters: guide.scale_tril",
    ),
    "statements": (
        (model_of(a=()), by_hand("loc")),
        (model_of(a=()), by_hand("other.loc")),
        r"missing parameters: other.loc\n  unexpected parameters: loc",
    ),
    "shape of a statement": (
        (model_of(a=()), by_hand("loc", (2,))),
        (model_of(a=()), by_hand("loc", (3,))),
        r"parameters of another shape: loc \(2,\) there, \(3,\) here",
    ),
    "network": (
        (Net(extra=True), AutoNormal),
        (Net(), AutoNormal),
        r"unexpected parameters: model.other.weight, model.other.bias",
    ),
    "width of a network": (
        (Net(2), AutoNormal),
        (Net(5), AutoNormal),
        r"parameters of another shape: model.net.weight \(2, 1\) there, \(5, 1\) here, model.net.b",
    ),
}


@pytest.mark.filterwarnings("ignore:the checkpoint has no random states")  # it holds weights alone
@pytest.mark.parametrize("name", ANOTHER)
def test_the_error_lists_what_differs(name, tmp_path):
    there, (model, guide), message = ANOTHER[name]
    saved = save(of(*there), tmp_path / "fit.ckpt")
    with pytest.raises(RuntimeError, match=message):
        PyroSVIModule.load_from_checkpoint(saved, model=model, guide=guide)
    with pytest.raises(RuntimeError, match=message):
        fit(PyroSVIModule(model, guide), ckpt_path=saved)


def test_the_order_of_sites_is_free_where_each_has_parameters_of_its_own(tmp_path):
    svi = of(SMALL)
    turned = PyroSVIModule.load_from_checkpoint(
        save(svi, tmp_path / "fit.ckpt"), model=model_of(b=(2,), a=())
    )
    for name, value in svi.state_dict().items():
        assert torch.equal(turned.state_dict()[name], value)


@pytest.mark.filterwarnings("ignore:Found keys that are")
def test_what_both_have_is_loaded_where_that_is_asked_for(tmp_path):
    svi = of(SMALL)
    loaded = PyroSVIModule.load_from_checkpoint(
        save(svi, tmp_path / "fit.ckpt"), model=model_of(a=(), c=(3,)), strict=False
    )
    assert torch.equal(loaded.guide.locs.a, svi.guide.locs.a)
    assert loaded.posterior_samples(1)["c"].shape == (1, 3)


def test_a_vector_of_other_sites_is_not_what_both_have(tmp_path):
    saved = save(of(SMALL, AutoMultivariateNormal), tmp_path / "fit.ckpt")
    with pytest.raises(RuntimeError, match=r"missing latent sites: c \(3,\)"):
        PyroSVIModule.load_from_checkpoint(
            saved, model=model_of(c=(3,)), guide=AutoMultivariateNormal, strict=False
        )


def test_a_model_that_takes_another_batch_is_named_with_the_sites_that_were_trained(path):
    def of_pairs(x, y):
        normal_mean(x)

    with pytest.raises(RuntimeError, match="missing 1 required.*latent sites: mu"):
        PyroSVIModule.load_from_checkpoint(path, model=of_pairs)


def test_rows_of_another_number_are_refused(tmp_path):
    checkpoints = []
    for size in (20, 30):
        svi = PyroSVIModule(latents_of_rows)
        fit(svi, data(size)).save_checkpoint(tmp_path / f"{size}.ckpt")
        checkpoints.append(torch.load(tmp_path / f"{size}.ckpt", weights_only=True))
    with pytest.raises(RuntimeError, match=r"guide.locs.z \(20,\) there, \(30,\) here"):
        svi.load_state_dict(checkpoints[0]["state_dict"])
    svi.load_state_dict(checkpoints[1]["state_dict"])


# -- weights alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, by_hand("loc")])
@pytest.mark.parametrize("strict", [True, False])
def test_a_guide_without_parameters_does_not_lose_those_that_are_loaded(guide, strict):
    state = of(model_of(a=()), guide).state_dict()
    fresh = PyroSVIModule(model_of(a=()), guide, dataset_size=N)
    with pytest.raises(RuntimeError, match=r"would be lost: (guide\.)?loc.*svi\.loss\(batch\)"):
        fresh.load_state_dict(state, strict=strict)
    fresh.loss(X[:B])
    fresh.load_state_dict(state, strict=strict)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_part_of_the_weights_may_be_loaded_before_the_first_batch():
    svi, net = PyroSVIModule(Net(), dataset_size=N), Net().net
    part = {f"model.net.{name}": value for name, value in net.state_dict().items()}
    assert svi.load_state_dict(part, strict=False) == ([], [])
    assert torch.equal(svi.model.net.weight, net.weight)


def test_hooks_that_rename_parameters_are_heard():
    svi = of(Net())

    def renamed(module, state, prefix, *rest):
        state[f"{prefix}weight"] = state.pop(f"{prefix}w")

    svi.model.net.register_load_state_dict_pre_hook(renamed)
    state = svi.state_dict()
    state["model.net.w"] = state.pop("model.net.weight") + 1.0
    svi.load_state_dict(state)
    assert torch.equal(svi.model.net.weight, state["model.net.w"])


def test_who_overrides_the_hook_without_super_is_told(path):
    class Silent(PyroSVIModule):
        def on_load_checkpoint(self, checkpoint):
            pass

    with pytest.raises(RuntimeError, match=r"on_load_checkpoint.*must call super\(\)"):
        Silent.load_from_checkpoint(path, model=normal_mean)


def test_an_instance_does_not_load(path):
    svi = PyroSVIModule.load_from_checkpoint(path, model=normal_mean)
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        svi.load_from_checkpoint(path)


def test_a_fit_goes_on_where_a_loaded_module_resumes_its_own_checkpoint(path):
    svi = PyroSVIModule.load_from_checkpoint(path, model=normal_mean)
    other = PyroSVIModule(normal_mean)
    for module in (svi, other):
        torch.manual_seed(0)
        resume(module, data(), path)
    assert_equal_draws(svi, other)
