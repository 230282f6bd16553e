"""What changes between steps is honoured by compiled code; traces are counted and bounded."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import N, regression, regression_batch
from compiled_support import AS_TRACED, assert_equal_steps, is_compiled
from pyro import poutine
from support import no_validation, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.compiled import _MOST, _MOST_KEPT, _PATIENCE

GLOBAL_WEIGHT = 1.0
SETTINGS = {"weight": 1.0}


def batches(first, count=3):
    return map(regression_batch, range(first, first + count))


def both_after(change, svi, eager, steps=_PATIENCE + 4):
    """Compare two compiled steps and then, when both have changed, many more."""
    assert_equal_steps(svi, eager, batches(0), 1e-6, 1e-5)
    assert is_compiled(svi)
    for module in (svi, eager):
        change(module)
    assert_equal_steps(svi, eager, batches(10, steps), 1e-6, 1e-5, first_seed=10)


class Weighted(PyroSVIModule):
    """Its KL is weighted by an attribute, a buffer and a tensor, a global, and a dict's entry."""

    def __init__(self, **options):
        super().__init__(dataset_size=N, **options)
        self.beta = 1.0
        self.register_buffer("buffer", torch.tensor(1.0))
        self.plain = torch.tensor(1.0)
        self.net = nn.Linear(3, 1)
        self.drop = nn.Dropout(0.5)
        self.late = nn.Parameter(torch.tensor([0.1]), requires_grad=False)

    def model(self, x, y):
        weight = self.beta * GLOBAL_WEIGHT * SETTINGS["weight"]
        with poutine.scale(scale=weight), poutine.scale(scale=self.buffer * self.plain):
            bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            loc = (self.net(self.drop(x)) + self.late).squeeze(-1) + bias
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def weighted(**options):
    torch.manual_seed(0)
    return Weighted(checks=False, **options)


@pytest.fixture
def pair():
    return weighted(compile=AS_TRACED), weighted()


def set_attribute(name, value):
    return lambda module: setattr(module, name, value)


def in_place(module):
    module.buffer.fill_(0.25)


def in_place_of_plain(module):
    module.plain.fill_(0.25)


def swap(module):
    torch.manual_seed(9)
    module.net = nn.Linear(3, 1)


def swap_parameter(module):
    torch.manual_seed(9)
    module.net.weight = nn.Parameter(torch.randn(1, 3))


def freeze(module):
    module.net.weight.requires_grad_(False)


def thaw(module):
    module.late.requires_grad_(True)


def tie(module):
    module.late = module.net.bias


def other_data(module):
    module.net.weight.data = module.net.weight.data * 2


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        in_place_of_plain,
        set_attribute("buffer", torch.tensor(0.3)),
        set_attribute("plain", torch.tensor(0.3)),
        set_attribute("beta", 0.2),
        set_attribute("beta", 2),
        set_attribute("_given_size", 7),
        set_attribute("_dataset_size", 400),
        nn.Module.eval,
        lambda module: module.drop.eval(),
        set_attribute("drop", nn.Identity()),
        swap,
        swap_parameter,
        other_data,
        freeze,
        thaw,
        tie,
    ],
    ids=[
        "buffer in place",
        "tensor in place",
        "buffer replaced",
        "tensor replaced",
        "attribute",
        "attribute of another type",
        "size given",
        "N",
        "eval",
        "eval of a part",
        "part replaced by another kind",
        "part replaced",
        "parameter replaced",
        "parameter's data replaced",
        "frozen",
        "thawed",
        "tied",
    ],
)
def test_a_change_after_compilation_is_honoured(pair, change):
    both_after(change, *pair)


def test_a_global_is_honoured(pair, monkeypatch):
    both_after(lambda _: monkeypatch.setattr(__import__(__name__), "GLOBAL_WEIGHT", 0.1), *pair)


def test_an_entry_of_a_dict_is_honoured(pair, monkeypatch):
    both_after(lambda _: monkeypatch.setitem(SETTINGS, "weight", 0.1), *pair)


def test_another_precision_is_honoured():
    svi, eager = weighted(compile=AS_TRACED), weighted()
    assert_equal_steps(svi, eager, batches(0), 1e-6, 1e-5)
    assert is_compiled(svi)
    for module in (svi, eager):
        module.double()
    exact = [tuple(t.double() for t in batch) for batch in batches(10, _PATIENCE + 4)]
    assert_equal_steps(svi, eager, exact, 1e-10, 1e-10, first_seed=10)
    assert svi._compiled.compilations == 2


def test_autocast_is_honoured():
    svi, eager = weighted(compile=AS_TRACED), weighted()
    assert_equal_steps(svi, eager, batches(0), 1e-6, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        # Half precision in the network: eight bits of it.
        assert_equal_steps(svi, eager, batches(10, _PATIENCE + 4), 1e-2, 3e-2, first_seed=10)
    assert svi._compiled.compilations == 2
    assert_equal_steps(svi, eager, batches(50), 1e-6, 1e-5, first_seed=50)
    assert svi._compiled.compilations == 2


def test_a_batch_of_another_size_is_eager_at_first_and_compiled_once_it_is_frequent():
    svi, eager = weighted(compile=AS_TRACED), weighted()
    assert_equal_steps(svi, eager, batches(0), 1e-6, 1e-5)
    assert (svi._compiled.traces, svi._compiled.compilations) == (1, 1)
    smaller = [regression_batch(seed, rows=5) for seed in range(_PATIENCE + 3)]
    assert_equal_steps(svi, eager, smaller[:_PATIENCE], 1e-6, 1e-5)
    assert (svi._compiled.traces, svi._compiled.compilations) == (1, 1)
    assert_equal_steps(svi, eager, smaller[_PATIENCE:], 1e-6, 1e-5)
    assert (svi._compiled.traces, svi._compiled.compilations) == (2, 2)


def test_traces_are_bounded_and_what_comes_then_is_eager_with_one_warning():
    svi, eager = weighted(compile=AS_TRACED), weighted()
    with pytest.warns(UserWarning, match=f"{_MOST} traces have been made.*another shape") as caught:
        for rows in range(2, 2 + _MOST + 3):
            alike = (regression_batch(seed, rows=rows) for seed in range(_PATIENCE + 3))
            assert_equal_steps(svi, eager, alike, 1e-6, 1e-5)
    assert svi._compiled.traces == svi._compiled.compilations == _MOST
    assert len(caught) == 1


def test_ever_new_sizes_are_eager_with_one_warning():
    svi, eager = weighted(compile=AS_TRACED), weighted()
    for module in (svi, eager):
        module._given_size = module._dataset_size = 1000
    sizes = (regression_batch(rows, rows=rows) for rows in range(2, 2 + _MOST_KEPT))
    assert_equal_steps(svi, eager, sizes, 1e-6, 1e-5)
    more = (regression_batch(rows, rows=rows) for rows in range(100, 110))
    with pytest.warns(UserWarning, match=f"batches have come in {_MOST_KEPT} shapes") as caught:
        assert_equal_steps(svi, eager, more, 1e-6, 1e-5)
    assert len(caught) == 1


def test_ever_new_python_state_is_eager_with_one_warning_that_names_it():
    svi, eager = weighted(compile=AS_TRACED), weighted()
    with pytest.warns(UserWarning, match="Python state: beta changes from step to step") as caught:
        for step in range(_MOST_KEPT + 10):
            svi.beta = eager.beta = 1 + step / 100
            assert_equal_steps(svi, eager, batches(step, 1), 1e-6, 1e-5)
    assert len(caught) == 1


@no_validation
def test_a_second_fit_on_other_data_has_its_own_size():
    losses = []
    for options in ({"compile": AS_TRACED}, {}):
        torch.manual_seed(0)
        svi = PyroSVIModule(regression, **options)
        for rows in (32, 64):
            data = ArrayDataModule(regression_batch(0, rows=rows), batch_size=8)
            # Enough steps of the second size, so that it is compiled as well.
            quiet_trainer(max_epochs=4).fit(svi, datamodule=data)
            torch.manual_seed(1)
            losses.append(svi.loss(regression_batch(5)).detach())
        if options:
            # Of each size a whole step; the loss alone is compared with eager first.
            assert svi._compiled.compilations == 2
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-5, atol=0)


def test_one_batch_that_always_comes_again_is_compiled_and_others_are_compared_then():
    svi, eager = weighted(compile=AS_TRACED), weighted()
    assert_equal_steps(svi, eager, [regression_batch(0)] * 5, 1e-6, 1e-5)
    assert is_compiled(svi)
    assert_equal_steps(svi, eager, batches(1), 1e-6, 1e-5)
    assert svi._compiled.compilations == 1


class Annealed(PyroSVIModule):
    """Weighs its KL by a count of the Trainer's, or by a default of its class."""

    weight = 0.5
    by = "epoch"

    def model(self, x, y):
        count = self.current_epoch if self.by == "epoch" else self.trainer.global_step
        with poutine.scale(scale=self.weight / (1 + count)):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


@no_validation
@pytest.mark.parametrize("by", ["epoch", "step"])
@pytest.mark.parametrize("steps", [1, 4])
def test_counts_of_the_trainer_are_followed(by, steps):
    found = []
    for options in ({"compile": AS_TRACED, "steps_per_batch": steps}, {"steps_per_batch": steps}):
        torch.manual_seed(0)
        svi = Annealed(checks=False, **options)
        svi.by = by
        # 60 steps: fewer than the states that are remembered.
        data = ArrayDataModule(regression_batch(0, rows=80), batch_size=4)
        quiet_trainer(max_epochs=3).fit(svi, datamodule=data)
        found.append({name: p.detach() for name, p in svi.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_default_of_the_class_that_is_hidden_later_is_honoured():
    def make(**options):
        torch.manual_seed(0)
        svi = Hides(dataset_size=N, checks=False, **options)
        return svi

    class Hides(PyroSVIModule):
        weight = 0.5

        def model(self, x, y):
            with poutine.scale(scale=self.weight):
                w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    both_after(set_attribute("weight", 5.0), make(compile=AS_TRACED), make())
