"""``pyro.param`` and ``pyro.module`` statements, against the steps of Pyro's own SVI."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.poutine import block
from torch import nn

from pyro_lightning import PyroSVIModule

N, B = 40, 10
X = torch.randn(B, generator=torch.Generator().manual_seed(8)) + 1.0
LR = 0.03
POSITIVE = constraints.positive


@pytest.fixture(autouse=True)
def store():
    """Pyro's global store, with entries of the tests' names that must be neither read nor set."""
    with pyro.get_param_store().scope():
        store = pyro.get_param_store()
        for name in ("p", "q", "loc", "net$$$weight", "net$$$bias"):
            store.setdefault(name, torch.tensor(77.0))
        before = dict(store.named_parameters())
        yield store
        after = dict(store.named_parameters())
        assert after.keys() == before.keys()
        assert all(after[name] is p and p.item() == 77.0 for name, p in before.items())


def observe(loc, x):
    # With its rows given, the plate is Pyro's own mini-batch of N, without a draw.
    with pyro.plate("data", N, subsample=torch.arange(len(x))):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


def no_guide(x):
    """For a model without latents."""


def steps(model, guide=no_guide, count=5):
    """Parameters after steps of Adam, each with the noise of its own seed; and the module."""
    svi = PyroSVIModule(model, guide, dataset_size=N)
    svi.loss(X)
    optimizer = torch.optim.Adam(svi.parameters(), lr=LR)
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        svi.loss(X).backward()
        optimizer.step()
    held = svi._pyro_param_store.named_parameters()
    return {name.replace("|", "."): p.detach() for name, p in held}, svi


def pyros_steps(model, guide=no_guide, count=5):
    """The same by Pyro: constrained values too."""
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        store = pyro.get_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": LR}), Trace_ELBO())
        for seed in range(count):
            torch.manual_seed(seed)
            svi.step(X)
        free = {name: p.detach().clone() for name, p in store.named_parameters()}
        return free, {name: value.detach().clone() for name, value in store.items()}


def assert_same_steps(model, guide=no_guide):
    ours, svi = steps(model, guide)
    theirs, values = pyros_steps(model, guide)
    start, _ = steps(model, guide, count=0)
    assert ours.keys() == theirs.keys()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6, check_stride=False)
        assert not torch.equal(p, start[name])
    return svi, values


# -- constraints -----------------------------------------------------------------------------------

SQUARE = torch.tensor([[1.5, 0.0], [0.4, 0.8]])
CONSTRAINED = {
    "real": (constraints.real, torch.tensor([0.5, -0.3])),
    "positive": (POSITIVE, torch.tensor([0.5, 2.0])),
    "softplus_positive": (constraints.softplus_positive, torch.tensor([0.5, 2.0])),
    "greater_than": (constraints.greater_than(1.0), torch.tensor([1.5, 2.0])),
    "less_than": (constraints.less_than(1.0), torch.tensor([0.5, -2.0])),
    "interval": (constraints.interval(-1.0, 3.0), torch.tensor([-0.5, 2.0])),
    "unit_interval": (constraints.unit_interval, torch.tensor([0.2, 0.9])),
    "simplex": (constraints.simplex, torch.tensor([0.2, 0.3, 0.5])),
    "ordered_vector": (constraints.ordered_vector, torch.tensor([-0.5, 0.2, 1.0])),
    "positive_ordered_vector": (
        constraints.positive_ordered_vector,
        torch.tensor([0.1, 0.2, 1.0]),
    ),
    "sphere": (constraints.sphere, torch.tensor([0.6, 0.8])),
    "lower_cholesky": (constraints.lower_cholesky, SQUARE),
    "corr_cholesky": (constraints.corr_cholesky, torch.tensor([[1.0, 0.0], [0.8, 0.6]])),
    "positive_definite": (constraints.positive_definite, SQUARE @ SQUARE.T),
    "independent": (constraints.independent(POSITIVE, 1), torch.tensor([0.5, 2.0])),
}


@pytest.mark.parametrize("given", ["tensor", "callable"])
@pytest.mark.parametrize("kind", CONSTRAINED)
def test_a_constrained_param_trains_as_in_pyro(kind, given):
    constraint, init = CONSTRAINED[kind]

    def model(x):
        # Cloned, since Pyro trains a tensor without constraint in place.
        start = init.clone() if given == "tensor" else lambda: init.clone()
        value = pyro.param("p", start, constraint=constraint)
        observe((value * torch.arange(1.0, 1 + value.numel()).reshape(value.shape)).sum(), x)

    svi, values = assert_same_steps(model)
    trace = pyro.poutine.trace(svi._pyro_param_store.as_global_store()(svi.model)).get_trace(X)
    value = trace.nodes["p"]["value"]
    assert constraint.check(value).all()
    torch.testing.assert_close(value, values["p"], rtol=1e-5, atol=1e-6)


# -- the same name, again --------------------------------------------------------------------------


def test_a_param_of_model_and_guide_is_one_parameter():
    def model(x):
        p = pyro.param("p", torch.tensor(0.5))
        observe(p * pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    def guide(x):
        p = pyro.param("p", torch.tensor(0.5))
        pyro.sample("z", dist.Normal(p, 0.3))

    assert_same_steps(model, guide)


def test_a_later_statement_may_leave_value_and_constraint_out():
    def model(x):
        # The guide runs first.
        observe(pyro.sample("z", dist.Normal(0.0, 1.0)) * pyro.param("p"), x)

    def guide(x):
        pyro.sample("z", dist.Normal(1.0, pyro.param("p", torch.tensor(0.5), constraint=POSITIVE)))

    assert_same_steps(model, guide)


def test_a_guide_of_a_part_of_the_model_does_not_touch_the_store():
    # poutine.block hides the param statement from all handlers but Pyro's own.
    def model(x):
        a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
        observe(a + b + pyro.param("p", torch.tensor(0.5), constraint=POSITIVE), x)

    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, expose=["a"])))
    guide.append(AutoDelta(block(model, expose=["b"])))
    params, svi = steps(model, guide)
    assert params.keys() == {"p"}
    assert len(list(svi.parameters())) == 4  # p, two of a, one of b


def test_what_a_handler_hides_has_the_value_that_trains():
    hidden, shown = [], []

    def model(x):
        p = pyro.param("p", torch.tensor(0.5), constraint=POSITIVE)
        with block():
            hidden.append(pyro.param("p", torch.tensor(0.5), constraint=POSITIVE).item())
        shown.append(p.item())
        observe(p, x)

    steps(model)
    assert hidden == shown
    assert len(set(hidden)) >= 5  # it moves


# -- event_dim and plates --------------------------------------------------------------------------

GROUPS = torch.tensor([[0.3, -0.2], [0.1, 0.5], [-0.7, 0.2]])


def of_groups(event_dim, init, rows=None):
    def model(x):
        with pyro.plate("groups", 3, subsample=rows):
            p = pyro.param("p", init.clone(), event_dim=event_dim)
            level = pyro.sample("level", dist.Normal(p, 1.0).to_event(p.dim() - 1))
        observe(level.sum(), x)

    def guide(x):
        with pyro.plate("groups", 3, subsample=rows):
            q = pyro.param("q", init + 0.1, event_dim=event_dim)
            pyro.sample("level", dist.Normal(q, 0.3).to_event(q.dim() - 1))

    return model, guide


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2])], ids=["all", "some groups"])
@pytest.mark.parametrize(("event_dim", "init"), [(0, GROUPS[:, 0]), (1, GROUPS)])
def test_params_of_a_plate_that_is_not_of_the_data(event_dim, init, rows):
    svi = PyroSVIModule(*of_groups(event_dim, init, rows), dataset_size=N)
    svi.loss(X).backward()
    grads = {name: p.grad for name, p in svi._pyro_param_store.named_parameters()}
    assert {p.shape for p in svi.parameters()} == {init.shape}
    # Groups that are not drawn have no gradient.
    assert [bool(row.any()) for row in grads["p"]] == [rows is None or i in rows for i in range(3)]
    ours, _ = steps(*of_groups(event_dim, init, rows))
    theirs, _ = pyros_steps(*of_groups(event_dim, init, rows))
    for name in ("p", "q"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_event_dim_outside_of_plates():
    def model(x):
        p = pyro.param("p", GROUPS.exp(), constraint=POSITIVE, event_dim=1)
        observe(p.sum(), x)

    assert_same_steps(model)


# -- pyro.module -----------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [False, True])
def test_pyro_module_trains_its_network_and_reads_nothing_from_the_store(update):
    def pair():
        torch.manual_seed(4)
        net = nn.Linear(1, 1)

        def model(x):
            pyro.module("net", net, update_module_params=update)
            observe(net(x[:, None])[:, 0], x)

        return net, model

    net, model = pair()
    _, svi = steps(model)
    assert {id(p) for p in svi.parameters()} == {id(p) for p in net.parameters()}
    theirs, model = pair()
    pyros_steps(model)
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class Slotted:
    """An object without a dictionary of attributes, which is not looked into."""

    __slots__ = ("net",)


def test_pyro_module_of_a_network_that_is_not_found_trains_its_parameters():
    held = Slotted()
    held.net = nn.Linear(1, 1)

    def model(x):
        net = pyro.module("net", held.net)
        observe(net(x[:, None])[:, 0], x)

    params, _ = steps(model)
    assert params.keys() == {"net$$$weight", "net$$$bias"}
    assert {id(p) for p in svi_parameters(model)} == {id(p) for p in held.net.parameters()}


def svi_parameters(model):
    svi = PyroSVIModule(model, no_guide, dataset_size=N)
    svi.loss(X)
    return svi.parameters()
