"""Networks that functions use: layers of every kind, under Lightning, from checkpoints."""

from functools import partial

import pytest
import torch
from closure_nets import BATCH, ROWS, B, N, X, Y, guide, in_closure, linear, names, observe, steps
from support import StepLosses, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule

pytestmark = pytest.mark.usefixtures("untouched_store")


# -- layers of every kind --------------------------------------------------------------------------


def test_running_statistics_are_saved_and_the_first_batch_leaves_them():
    net = nn.Sequential(linear(), nn.BatchNorm1d(1))
    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N)
    quiet_trainer(max_epochs=1).fit(svi, ROWS)
    assert int(net[1].num_batches_tracked) == N // B
    assert torch.equal(svi.state_dict()["_networks.net.1.running_mean"], net[1].running_mean)


def test_train_and_eval_reach_the_network():
    net = nn.Sequential(linear(), nn.Dropout(0.5))
    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N).eval()
    assert not net[1].training
    svi.train()
    assert net[1].training


def test_lazy_layers_are_made_by_the_first_batch():
    net = nn.LazyLinear(1)
    svi = PyroSVIModule(in_closure(net), guide)
    quiet_trainer(max_epochs=1).fit(svi, ROWS)
    assert svi.state_dict()["_networks.net.weight"].shape == (1, 2)


def test_frozen_networks_and_buffers_follow_the_module_and_do_not_train():
    frozen, center = linear().requires_grad_(False), nn.BatchNorm1d(2, affine=False).eval()

    def model(x, y):
        observe(frozen(center(x)), y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(BATCH)
    svi.double()
    assert svi.loss((X[:B].double(), Y[:B].double())).dtype == torch.float64
    assert names(svi) == {"frozen", "center"}
    assert [name for name, p in svi.named_parameters() if p.requires_grad] == [
        "_pyro_param_store.loc",
        "_pyro_param_store.scale",
    ]


def test_a_network_without_gradient_in_the_first_batch_follows_the_module_and_may_train_later():
    # A network of labelled rows alone: the first batch may have none.
    net = linear()

    def model(x, y):
        observe(net(x) if y.mean() > 0 else x[:, :1], y)

    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss((X[:B], -torch.ones(B)))
    svi.loss((X[:B], torch.ones(B))).backward()
    assert names(svi) == {"net"}
    assert net.weight.grad is not None


# -- Lightning -------------------------------------------------------------------------------------


def test_a_fit_in_double_precision():
    net = linear()
    svi = PyroSVIModule(in_closure(net), guide)
    rows = DataLoader(TensorDataset(X.double(), Y.double()), batch_size=B)
    quiet_trainer(max_epochs=1, precision="64-true").fit(svi, rows)
    assert net.weight.dtype == torch.float64


def test_a_module_that_moves_before_its_first_loss_takes_its_networks_along():
    net = linear()
    PyroSVIModule(in_closure(net), guide, dataset_size=N).to("meta")
    assert net.weight.device.type == "meta"


def test_a_first_loss_in_inference_mode_leaves_networks_that_train():
    net = nn.Sequential(nn.LazyLinear(1), nn.BatchNorm1d(1))
    svi = PyroSVIModule(in_closure(net), guide, dataset_size=N)
    quiet_trainer().validate(svi, ROWS, verbose=False)
    before = {name: p.detach().clone() for name, p in svi.named_parameters()}
    quiet_trainer(max_epochs=1).fit(svi, ROWS)
    # The bias before a normalisation has no effect and no gradient but rounding.
    moved = {name for name, p in svi.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= set(before) - {"_networks.net.0.bias"}


def as_argument(net, x, y):
    observe(net(x), y)


@pytest.fixture(params=["closure", "partial"])
def build(request):
    """Makes modules of one model, each with a network of its own."""
    make = in_closure if request.param == "closure" else lambda net: partial(as_argument, net)
    return lambda: PyroSVIModule(make(linear()), guide, dataset_size=N)


def seeded_loss(svi):
    torch.manual_seed(0)
    return svi.loss(BATCH)


def test_a_state_dict_comes_back_in_a_fresh_module(build):
    trained, fresh = build(), build()
    steps(trained)
    fresh.loss(BATCH)
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(seeded_loss(fresh), seeded_loss(trained), rtol=0, atol=0)


def test_a_fit_goes_on_from_a_checkpoint_in_a_fresh_module(build, tmp_path):
    def fit(svi, epochs, path=None):
        # The noise of each step is that of one seed.
        trainer = quiet_trainer(max_epochs=epochs, callbacks=[StepLosses()])
        trainer.fit(svi, ROWS, ckpt_path=path)
        return trainer

    whole, half, fresh = build(), build(), build()
    fit(whole, 4)
    fit(half, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(fresh, 4, tmp_path / "half.ckpt")
    state, expected = fresh.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        assert not torch.equal(value, half.state_dict()[name])
