"""A module that was pickled and read back is equal to it, and pickling leaves it as it was."""

import copy
import pickle
from itertools import product

import pytest
import torch
from checkpoint_support import move
from picklable import MODULES, B, X, batch, figures, list_of_guides, model, of
from pyro.infer.autoguide import AutoNormal
from support import quiet_trainer, run_script

from pyro_lightning import ArrayDataModule, PyroSVIModule

pytestmark = pytest.mark.usefixtures("untouched_store")

EAGER = [name for name in MODULES if name != "compiled"]  # which takes seconds to compile


def again(svi):
    return pickle.loads(pickle.dumps(svi))


def assert_equal(one, other):
    ours, theirs = figures(one), figures(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("take", [again, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_before_its_first_batch_a_copy_becomes_what_the_module_does(name, take):
    svi = MODULES[name]()
    copied = take(svi)
    for each in (svi, copied):
        torch.manual_seed(0)
        each.loss(batch())
    assert_equal(svi, copied)


@pytest.mark.parametrize(
    ("name", "take"), [*product(EAGER, (again, copy.deepcopy)), ("compiled", again)]
)
def test_after_its_first_batch_a_copy_is_equal_and_apart(name, take):
    svi = MODULES[name]()
    svi.loss(batch())
    move(svi)
    before = figures(svi)
    copied = take(svi)
    assert_equal(svi, copied)
    move(copied, seed=1)
    assert figures(copied)["loss"] != before["loss"]
    assert all(torch.equal(value, before[key]) for key, value in figures(svi).items())


@pytest.mark.parametrize("name", ["AutoGuideList", "latents of rows", "subclass", "PyroModule"])
def test_a_fitted_module_is_pickled_and_trains_on(name):
    svi = MODULES[name]()

    def fit(module):
        torch.manual_seed(2)
        quiet_trainer(max_epochs=1).fit(module, datamodule=ArrayDataModule(X, batch_size=B))

    fit(svi)
    copied = again(svi)
    assert_equal(svi, copied)
    for each in (svi, copied):
        fit(each)
    assert_equal(svi, copied)


@pytest.mark.parametrize("make", [lambda: AutoNormal(model), list_of_guides])
def test_the_live_guide_keeps_its_model_and_master(make):
    guide = make()
    svi = of(model, guide)
    parts = [part for part in guide.modules() if isinstance(part, type(guide) | AutoNormal)]
    before = [(part.model, part.master) for part in parts]
    pickle.dumps(svi)
    # Of the guide in the user's hands, before the module has looked at it.
    assert [(part.model, part.master) for part in parts] == before


def test_a_loaded_module_is_pickled(tmp_path):
    svi = of(model, list_of_guides())
    svi.loss(batch())
    trainer = quiet_trainer()
    trainer.strategy.connect(svi)
    trainer.save_checkpoint(tmp_path / "fit.ckpt", weights_only=True)
    loaded = PyroSVIModule.load_from_checkpoint(
        tmp_path / "fit.ckpt", model=model, guide=list_of_guides()
    )
    assert_equal(again(loaded), svi)


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    return run_script("spawn_module.py", tmp_path_factory.mktemp("spawn"))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", EAGER)
def test_a_spawned_process_gets_the_module(name, when, spawned):
    found, expected = spawned
    assert found[f"{name}, {when}"] == expected[f"{name}, {when}"]
