"""TraceGraph_ELBO: Pyro's value, gradients and baselines, without its global store."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceGraph_ELBO
from support import MixedGuide, MixedModel, mixed_rows, no_validation, quiet_trainer, with_plate
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule, negative_elbo

N = 50


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


def by_rows(y, rows):
    """What Pyro asks for: the size of the data set and which of its rows these are."""
    return pyro.plate("data", N, subsample=rows)


def by_batch(y, rows):
    return pyro.plate("data", len(y))


class Switches(nn.Module):
    """Two states of the whole and two of each row, none of which can be reparametrised."""

    def __init__(self, plate):
        super().__init__()
        self.plate = plate
        self.locs = nn.Parameter(torch.tensor([-0.5, 0.8]))

    def forward(self, y, rows):
        state = pyro.sample("state", dist.Bernoulli(0.3))
        shift = pyro.sample("shift", dist.Normal(state, 1.0))
        with self.plate(y, rows):
            switch = pyro.sample("switch", dist.Bernoulli(0.2 + 0.5 * state))
            loc = torch.where(switch > 0, self.locs[1], self.locs[0])
            pyro.sample("y", dist.Normal(loc + shift, 0.7), obs=y)


class SwitchesGuide(nn.Module):
    """Its guide; ``baseline`` makes what the row's site and the global one ask for."""

    def __init__(self, plate, baseline):
        super().__init__()
        self.plate, self.baseline = plate, baseline
        self.logit = nn.Parameter(torch.tensor(0.2))
        self.loc = nn.Parameter(torch.tensor(0.1))
        self.slope = nn.Parameter(torch.tensor(0.6))
        self.net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
        self.level = nn.Parameter(torch.tensor(20.0))

    def forward(self, y, rows):
        infer = {"baseline": GLOBAL[self.baseline](self, y)} if self.baseline in GLOBAL else {}
        state = pyro.sample("state", dist.Bernoulli(logits=self.logit), infer=infer)
        pyro.sample("shift", dist.Normal(self.loc * state, 0.5))
        infer = {"baseline": LOCAL[self.baseline](self, y)} if self.baseline else {}
        with self.plate(y, rows):
            pyro.sample("switch", dist.Bernoulli(logits=self.slope * y), infer=infer)


def row_network(guide, y):
    return lambda inputs: guide.net(inputs).squeeze(-1)


LOCAL = {
    "average": lambda guide, y: {"use_decaying_avg_baseline": True, "baseline_beta": 0.8},
    "network": lambda guide, y: {
        "nn_baseline": row_network(guide, y),
        "nn_baseline_input": y[:, None],
    },
    "value": lambda guide, y: {"baseline_value": guide.level * torch.ones_like(y)},
    "average and network": lambda guide, y: {
        "use_decaying_avg_baseline": True,
        "nn_baseline": row_network(guide, y),
        "nn_baseline_input": y[:, None],
    },
}
GLOBAL = {
    "average": lambda guide, y: {"use_decaying_avg_baseline": True, "baseline_beta": 0.7},
    "value": lambda guide, y: {"baseline_value": guide.level},
}
BASELINES = [None, *LOCAL]


def batch(count=4):
    return torch.linspace(-1, 2, count), 3 * torch.arange(count)


def module(baseline=None, **options):
    parts = Switches(by_batch), SwitchesGuide(by_batch, baseline)
    svi = PyroSVIModule(*parts, TraceGraph_ELBO(**options), dataset_size=N)
    with torch.no_grad():
        svi.loss(batch())
    return svi


def ours(svi, rows, seed):
    """Value and gradients of one step."""
    svi.zero_grad()
    torch.manual_seed(seed)
    loss = svi.loss(rows)
    loss.backward()
    return float(loss.detach()), gradients(svi)


def theirs(svi, rows, seed, **options):
    """The same by Pyro alone, which keeps its averages in its store between steps."""
    parts = [with_plate(part, by_rows) for part in (svi.model, svi.guide)]
    svi.zero_grad()
    torch.manual_seed(seed)
    loss = TraceGraph_ELBO(**options).loss_and_grads(*parts, *rows)
    return float(loss), gradients(svi)


def gradients(svi):
    return {n: p.grad.clone() for n, p in svi.named_parameters() if p.grad is not None}


def assert_same(pair, other):
    assert pair[0] == pytest.approx(other[0], rel=1e-9)
    assert pair[1].keys() == other[1].keys()
    for name, gradient in pair[1].items():
        torch.testing.assert_close(gradient, other[1][name], rtol=1e-9, atol=1e-12)


# Local terms stand under the latents that can be reparametrised, and under those that cannot.
@pytest.mark.parametrize("latents", [("global",), ("local",), ("global", "local")])
def test_reparametrised_latents_equal_pyros(latents):
    plate = {"ours": lambda x, rows: pyro.plate("data", len(x)), "theirs": by_rows}
    model, guide = MixedModel(plate["ours"], latents), MixedGuide(plate["ours"], latents)
    svi = PyroSVIModule(model, guide, TraceGraph_ELBO(), dataset_size=N)
    rows = tuple(column[:4] for column in mixed_rows(N))
    svi.loss(rows)
    assert_same(ours(svi, rows, 3), theirs(svi, rows, 3))


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("baseline", BASELINES)
def test_every_step_equals_pyros(baseline, particles):
    svi, rows = module(baseline, num_particles=particles), batch()
    steps = [ours(svi, rows, seed) for seed in range(4)]
    assert "guide.logit" in steps[0][1]
    for seed, step in enumerate(steps):
        assert_same(step, theirs(svi, rows, seed, num_particles=particles))


@pytest.mark.parametrize("baseline", [None, "average"])
def test_vectorised_particles_equal_pyros(baseline):
    options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    svi, rows = module(baseline, **options), batch()
    steps = [ours(svi, rows, seed) for seed in range(3)]
    for seed, step in enumerate(steps):
        assert_same(step, theirs(svi, rows, seed, **options))


def test_ragged_batch_has_an_average_of_its_own():
    # Pyro's own average of four rows fails on a batch of three. Here the steps of either size are
    # those of a run that never sees the other.
    svi, sizes = module("average and network"), (batch(4), batch(3))
    steps = [ours(svi, sizes[seed % 2], seed) for seed in range(4)]
    for first, rows in enumerate(sizes):
        pyro.clear_param_store()
        for seed in (first, first + 2):
            assert_same(steps[seed], theirs(svi, rows, seed))


@pytest.mark.parametrize("baseline", BASELINES)
def test_store_is_left_as_it_was(baseline):
    store = pyro.get_param_store()
    pyro.param("mine", torch.tensor(1.0))
    pyro.param("__baseline_avg_downstream_cost_switch", torch.full((4,), 7.0))
    svi = module(baseline)
    for seed in range(3):
        ours(svi, batch(), seed)
    assert set(store.keys()) == {"mine", "__baseline_avg_downstream_cost_switch"}
    assert float(store["mine"].detach()) == 1.0
    earlier = store["__baseline_avg_downstream_cost_switch"].detach()
    assert torch.equal(earlier, torch.full((4,), 7.0))


def test_averages_are_saved_and_loaded(tmp_path):
    svi = module("average")
    for seed in range(3):
        ours(svi, batch(), seed)
    torch.save(svi.state_dict(), tmp_path / "state.pt")
    other = module("average")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same(ours(svi, batch(), 9), ours(other, batch(), 9))
    fresh = module("average")
    fresh.load_state_dict({**svi.state_dict(), "_baselines._extra_state": {}})
    assert ours(svi, batch(), 9)[1]["guide.slope"] != ours(fresh, batch(), 9)[1]["guide.slope"]


def test_the_first_look_at_a_batch_leaves_averages_alone():
    svi = module("average")
    with torch.no_grad():
        svi.loss(batch())
    assert svi._baselines.averages == {}


def test_validation_leaves_averages_alone():
    svi = module("average")
    ours(svi, batch(), 0)
    before = {key: value.clone() for key, value in svi._baselines.averages.items()}
    with torch.inference_mode():
        svi.loss(batch())
    assert before.keys() == svi._baselines.averages.keys()
    assert all(torch.equal(value, svi._baselines.averages[key]) for key, value in before.items())


def test_a_baseline_network_that_the_guide_closes_over_trains():
    net = nn.Linear(1, 1)

    def guide(y, rows):
        baseline = {"nn_baseline": lambda x: net(x).squeeze(-1), "nn_baseline_input": y[:, None]}
        pyro.sample("state", dist.Bernoulli(0.5))
        pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            switch = dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1)) * y)
            pyro.sample("switch", switch, infer={"baseline": baseline})

    svi = PyroSVIModule(Switches(by_batch), guide, TraceGraph_ELBO(), dataset_size=N)
    gradients = torch.autograd.grad(svi.loss(batch()), list(net.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert {id(p) for p in net.parameters()} <= {id(p) for p in svi.parameters()}


@no_validation
def test_a_fit_with_ragged_batches_trains_guide_and_network():
    parts = Switches(by_batch), SwitchesGuide(by_batch, "average and network")
    optimizer = partial(torch.optim.Adam, lr=1e-2)
    svi = PyroSVIModule(*parts, TraceGraph_ELBO(), optimizer)
    before = {name: parameter.detach().clone() for name, parameter in svi.named_parameters()}
    data = ArrayDataModule((torch.linspace(-1, 2, N), torch.arange(N)), batch_size=16)
    quiet_trainer(max_epochs=1).fit(svi, datamodule=data)
    moved = {n for n, p in svi.named_parameters() if not torch.equal(p, before[n])}
    # The level serves another baseline.
    assert moved == before.keys() - {"guide.level"}
    assert {key[1:] for key in svi._baselines.averages} == {(16,), (2,)}


def test_negative_elbo_keeps_no_averages():
    model, guide = Switches(by_batch), SwitchesGuide(by_batch, "average")
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = negative_elbo(
            TraceGraph_ELBO(), model, guide, batch(), {}, plates={"data": N}, batch_size=4
        )
        values.append(torch.autograd.grad(loss, guide.slope)[0])
    assert torch.equal(*values)
    assert len(pyro.get_param_store()) == 0
