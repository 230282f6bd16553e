"""What changes unseen is found: compiled code is compared with eager again, from time to time."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import B, N, values_batch
from compiled_support import AS_TRACED, is_compiled, loss_and_gradients
from pyro.infer import TraceGraph_ELBO
from support import no_validation, quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.audits import _EARLY, _EPOCH, _FIRST, _LONGEST, Schedule


class Unseen:
    """A number in a list so long that it is not watched, and a count of the reads of it."""

    def __init__(self):
        self.values = [1.0] * 2000
        self.values[1] = 0

    def model(self, x):
        self.values[1] += 1
        mu = pyro.sample("mu", dist.Normal(0.0, self.values[0]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def made(unseen, **options):
    torch.manual_seed(0)
    return PyroSVIModule(unseen.model, dataset_size=N, checks=False, **options)


def losses(svi, steps):
    return torch.stack([loss_and_gradients(svi, values_batch(step), step)[0] for step in steps])


def change(svi, eager, unseen):
    """Take four steps, of which two are compiled, and change what is not watched."""
    assert torch.equal(losses(svi, range(4)), losses(eager, range(4)))
    assert is_compiled(svi)
    for each in unseen:
        each.values[0] = 0.1


def test_a_change_unseen_is_told_and_traced_anew():
    unseen = Unseen(), Unseen()
    svi, eager = made(unseen[0], compile=AS_TRACED), made(unseen[1])
    change(svi, eager, unseen)
    last = _FIRST + 2  # two eager steps, and then compiled ones
    wrong = losses(svi, range(4, last))
    assert not torch.isclose(wrong, losses(eager, range(4, last))).any()
    with pytest.warns(UserWarning, match=rf"up to {_FIRST} steps before .* traced anew") as caught:
        found = losses(svi, range(last, last + 6))
    assert torch.allclose(found, losses(eager, range(last, last + 6)), rtol=1e-6)
    assert len(caught) == 1
    assert svi._compiled.traces == 2
    assert is_compiled(svi)


def test_a_second_change_unseen_leaves_it_eager():
    unseen = Unseen()
    svi = made(unseen, compile=AS_TRACED)
    losses(svi, range(4))
    with pytest.warns(UserWarning, match="has changed and is not watched") as caught:
        for beta in (0.1, 0.2):
            unseen.values[0] = beta
            losses(svi, range(_FIRST + 6))
    assert len(caught) == 1
    assert not is_compiled(svi)


def test_strict_makes_an_error_of_a_change_unseen():
    unseen = Unseen()
    svi = made(unseen, compile="strict")
    svi._compiled.options = AS_TRACED
    losses(svi, range(4))
    unseen.values[0] = 0.1
    with pytest.raises(RuntimeError, match="has changed and is not watched"):
        losses(svi, range(_FIRST + 1))


def test_a_step_that_is_compared_runs_the_model_once_and_draws_as_eager_does():
    unseen = Unseen(), Unseen()
    svi, eager = made(unseen[0], compile=AS_TRACED), made(unseen[1])
    for module in (svi, eager):
        torch.manual_seed(0)
        for step in range(_FIRST + 2):
            module.loss(values_batch(step))
    read = [each.values[1] for each in unseen]
    states = []
    for module in (svi, eager):
        torch.manual_seed(7)
        module.loss(values_batch(0))
        states.append(torch.get_rng_state())
    assert unseen[0].values[1] - read[0] == unseen[1].values[1] - read[1] == 1
    assert torch.equal(*states)


class Annealed(PyroSVIModule):
    """Its hook changes, at an epoch's start, what is not watched."""

    def __init__(self, **options):
        self.values = [1.0] * 2000
        super().__init__(checks=False, **options)
        self.values = [1.0] * 2000

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.values[0] = 1.0 if self.current_epoch < 2 else 0.1

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, self.values[0]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@no_validation
@pytest.mark.parametrize("steps", [1, 2])
def test_a_change_at_the_start_of_an_epoch_is_found_in_its_first_step(steps):
    found = []
    for options in ({}, {"compile": AS_TRACED}):
        torch.manual_seed(0)
        svi = Annealed(steps_per_batch=steps, **options)
        data = ArrayDataModule(values_batch(0, rows=6 * B)[0], batch_size=B)
        trainer = quiet_trainer(max_epochs=4)
        if options:
            with pytest.warns(UserWarning, match="is not watched"):
                trainer.fit(svi, datamodule=data)
            assert svi._compiled.traces == 2
        else:
            trainer.fit(svi, datamodule=data)
        found.append({name: p.detach() for name, p in svi.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_baselines_move_as_in_eager_steps():
    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        q = pyro.param("q", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        baseline = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}
        pyro.sample("z", dist.Bernoulli(q), infer={"baseline": baseline})

    averages = []
    for compile in (AS_TRACED, False):
        svi = PyroSVIModule(model, guide, TraceGraph_ELBO(), dataset_size=N, compile=compile)
        if compile:
            with pytest.warns(UserWarning, match="differs from eager"):
                losses(svi, range(3))
        else:
            losses(svi, range(3))
        averages.append(svi._baselines.averages)
    torch.testing.assert_close(*averages, rtol=0, atol=0)


def test_comparisons_become_rarer():
    schedule, due = Schedule(steps=0, epoch=None), []
    for step in range(5 * _LONGEST):
        if schedule.due(step, epoch=None):
            due.append(step)
            schedule.done(step, None)
    gaps = [after - before for before, after in zip(due, due[1:], strict=False)]
    assert due[0] == _FIRST
    assert gaps == sorted(gaps)
    assert gaps[-1] == _LONGEST


def test_short_epochs_call_for_few_comparisons():
    schedule, due = Schedule(steps=0, epoch=0), []
    for step in range(1, 20 * _EPOCH):
        epoch = step // 10
        if schedule.due(step, epoch):
            due.append(epoch)
            schedule.done(step, epoch)
    assert due[:_EARLY] == list(range(1, _EARLY + 1))
    gaps = [after - before for before, after in zip(due[_EARLY:], due[_EARLY + 1 :], strict=False)]
    assert gaps == sorted(gaps)
    assert 10 * gaps[-1] == _EPOCH


def test_long_epochs_are_compared_in_their_first_step():
    schedule, due = Schedule(steps=0, epoch=0), []
    for step in range(20 * _LONGEST):
        epoch = step // _LONGEST
        if schedule.due(step, epoch):
            due.append(step)
            schedule.done(step, epoch)
    assert set(range(_LONGEST, 20 * _LONGEST, _LONGEST)) <= set(due)


def test_a_seed_gives_the_same_numbers_again():
    found = []
    for _ in range(2):
        unseen = Unseen()
        found.append(losses(made(unseen, compile=AS_TRACED), range(4 * _FIRST)))
    assert torch.equal(*found)
