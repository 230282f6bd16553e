"""Parameters under ``poutine.lift`` and ``pyro.random_module`` are latents, and nothing else."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from support import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule

pytestmark = [
    pytest.mark.usefixtures("untouched_store"),
    pytest.mark.filterwarnings("ignore:The `random_module` primitive is deprecated"),
]

N, B = 60, 20
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(3))
Y = X @ torch.tensor([1.0, -2.0]) + 0.5
BATCH = X[:B], Y[:B]
WEIGHTS, BIASES = ["0.weight", "2.weight"], ["0.bias", "2.bias"]


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


def priors(net, names):
    return {
        name: dist.Normal(torch.zeros_like(p), 1.0).to_event(p.dim())
        for name, p in net.named_parameters()
        if name in names
    }


def observe(loc, y):
    # With its rows given, the plate is Pyro's own mini-batch of N, without a draw.
    with pyro.plate("data", N, subsample=torch.arange(len(y))):
        pyro.sample("y", dist.Normal(loc[:, 0], 0.5), obs=y)


def random_module(net, names):
    """A model that draws a network, made anew from ``net`` at each run."""

    def model(x, y):
        observe(pyro.random_module("bnn", net, priors(net, names))()(x), y)

    return model


def lifted(net, names):
    """A model whose draws are put in the very ``net``."""

    def model(x, y):
        pyro.module("bnn", net, update_module_params=True)
        observe(net(x), y)

    return lambda x, y: poutine.lift(model, prior=priors(net, names))(x, y)


def random_guide(net, names):
    """The hand-written guide of Pyro's tutorials: ``random_module`` over trained Normals."""

    def guide(x, y):
        trained = {}
        for name, p in net.named_parameters():
            if name in names:
                loc = pyro.param(f"{name}.loc", torch.full_like(p, 0.1))
                positive = constraints.positive
                scale = pyro.param(f"{name}.scale", torch.full_like(p, 0.2), constraint=positive)
                trained[name] = dist.Normal(loc, scale).to_event(p.dim())
        return pyro.random_module("bnn", net, trained)()

    return guide


def gradients_by_name(svi):
    return {k.rpartition(".")[2].replace("|", "."): p.grad for k, p in svi.named_parameters()}


def pyros_loss(model, guide):
    torch.manual_seed(5)
    return Trace_ELBO().differentiable_loss(model, guide, *BATCH)


def seeded_loss(svi):
    torch.manual_seed(5)
    return svi.loss(BATCH)


FORMS = {"random_module": random_module, "lift": lifted}
all_or_some = pytest.mark.parametrize(
    "names", [WEIGHTS + BIASES, WEIGHTS], ids=["all lifted", "weights lifted"]
)
forms = pytest.mark.parametrize("form", FORMS)


@forms
@all_or_some
def test_an_autoguide_of_lifted_parameters_has_pyros_loss_and_gradients(form, names):
    model = FORMS[form](network(), names)
    guide = AutoNormal(model)
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(BATCH)
    loss = seeded_loss(svi)
    loss.backward()
    ours = gradients_by_name(svi)
    unlifted = [f"bnn$$${name}" for name in WEIGHTS + BIASES if name not in names]
    with pyro.settings.context(module_local_params=True), pyro.get_param_store().scope():
        reference = FORMS[form](network(), names)
        expected = pyros_loss(reference, guide)
        theirs = torch.autograd.grad(
            expected,
            [*guide.parameters(), *(pyro.param(n).unconstrained() for n in unlifted)],
        )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    of_guide = [p.grad for p in guide.parameters()]
    assert len(of_guide) == 2 * len(names)
    assert sum(1 for _ in svi.parameters()) == len(of_guide) + len(unlifted)
    for gradient, other in zip([*of_guide, *(ours[n] for n in unlifted)], theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=0)


@forms
@all_or_some
def test_a_guide_by_random_module_has_pyros_loss_and_gradients(form, names):
    def pair():
        net = network()
        return FORMS[form](net, names), random_guide(net, names)

    svi = PyroSVIModule(*pair(), dataset_size=N)
    svi.loss(BATCH)
    loss = seeded_loss(svi)
    loss.backward()
    with pyro.get_param_store().scope():
        expected = pyros_loss(*pair())
        expected.backward()
        theirs = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    ours = gradients_by_name(svi)
    assert sorted(ours) == sorted(theirs)
    assert sum(name.endswith(("loc", "scale")) for name in ours) == 2 * len(names)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=0)


@forms
@all_or_some
def test_a_network_is_as_before_after_lifted_runs(form, names):
    net = network()
    before = dict(net.named_parameters())
    svi = PyroSVIModule(FORMS[form](net, names), dataset_size=N)
    svi.loss(BATCH).backward()
    with torch.no_grad():
        svi.loss(BATCH)
    after = dict(net.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(
        torch.equal(p, q) for p, q in zip(net.parameters(), network().parameters(), strict=True)
    )


@forms
def test_a_lifted_network_trains_on_after_an_evaluation(form):
    # Draws that were made without gradient must not stay in the network as its parameters.
    svi = PyroSVIModule(FORMS[form](network(), WEIGHTS + BIASES), dataset_size=N)
    with torch.no_grad():
        svi.loss(BATCH)
    svi.loss(BATCH).backward()
    parameters = list(svi.parameters())
    assert parameters
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


@forms
def test_a_fit_of_a_bayesian_network_moves_all_its_latents_and_lowers_the_loss(form):
    torch.manual_seed(0)
    model = FORMS[form](network(), WEIGHTS + BIASES)
    guide = partial(AutoNormal, init_scale=0.02)
    svi = PyroSVIModule(model, guide, optimizer=partial(torch.optim.Adam, lr=0.05), dataset_size=N)
    before = seeded_loss(svi).detach()
    loader = DataLoader(TensorDataset(X, Y), batch_size=B)
    start = [p.detach().clone() for p in svi.parameters()]
    quiet_trainer(max_epochs=40).fit(svi, loader)
    pairs = zip(start, svi.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in pairs)
    # The rows are linear without noise: what is left is the constant of N and the KL.
    assert seeded_loss(svi) < before / 3
    draws = svi.posterior_samples(4)
    assert set(draws) == {f"bnn$$${name}" for name in WEIGHTS + BIASES}
    assert draws["bnn$$$0.weight"].shape == (4, 3, 2)


@forms
def test_a_copy_of_a_lifted_model_trains_apart(form):
    svi = PyroSVIModule(FORMS[form](network(), WEIGHTS), dataset_size=N)
    seeded_loss(svi)
    copied = copy.deepcopy(svi)
    torch.testing.assert_close(seeded_loss(copied), seeded_loss(svi), rtol=0, atol=0)
    with torch.no_grad():
        copied.loss(BATCH)
    seeded_loss(copied).backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in svi.parameters())
    assert len(list(copied.parameters())) == len(list(svi.parameters())) == 6


@forms
def test_the_network_of_lifted_parameters_follows_the_dtype(form):
    # Its buffers are in every copy that is made of it, and its priors are made like its parameters.
    net = network().append(nn.BatchNorm1d(1, affine=False))
    svi = PyroSVIModule(FORMS[form](net, WEIGHTS), dataset_size=N)
    svi.loss(BATCH)
    svi.double()
    assert svi.loss((X[:B].double(), Y[:B].double())).dtype == torch.float64
    assert net[3].running_mean.dtype == torch.float64


def test_a_lifted_param_statement_is_a_latent_and_no_parameter():
    def plain(x, y):
        loc = pyro.param("loc", torch.tensor(0.3))
        noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
        observe((x.sum(-1) * noise + loc)[:, None], y)

    def spelled_out(x, y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        noise = pyro.param("noise", torch.tensor(0.7), constraint=constraints.positive)
        observe((x.sum(-1) * noise + loc)[:, None], y)

    model = poutine.lift(plain, prior={"loc": dist.Normal(0.0, 1.0)})
    found = []
    for each in (model, spelled_out):
        torch.manual_seed(5)
        svi = PyroSVIModule(each, dataset_size=N)
        svi.loss(BATCH)
        loss = seeded_loss(svi)
        loss.backward()
        found.append((loss, {name: p.grad for name, p in svi.named_parameters()}))
    (loss, grads), (expected, wanted) = found
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    assert set(grads) == set(wanted)
    assert len(grads) == 3
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in grads.items())
