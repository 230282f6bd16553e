"""Lightning's own callbacks beside the module; those that average are in test_averages.py."""

import csv
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_support import AS_TRACED, assert_equal_steps, is_compiled
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from resume_support import arrays, global_model, model
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule

# Lightning's finder loads its own file, and its bar is no window's.
pytestmark = pytest.mark.filterwarnings("ignore:.*weights_only.*")


def make(lr=0.05, model=global_model, **options):
    torch.manual_seed(0)
    return PyroSVIModule(model, optimizer=partial(torch.optim.Adam, lr=lr), **options)


def data():
    return ArrayDataModule(arrays(), batch_size=4, val=arrays(8))


def fit(svi, *callbacks, **flags):
    torch.manual_seed(1)
    trainer = quiet_trainer(**{"max_epochs": 3, "callbacks": [*callbacks], **flags})
    trainer.fit(svi, datamodule=data())
    return trainer


class Rates(Callback):
    """Keeps the learning rate of each step, and parameters and losses of each validation."""

    def __init__(self):
        self.rates, self.losses, self.states = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["val_loss"]))
            state = pl_module.state_dict()
            self.states.append({name: value.clone() for name, value in state.items()})


def test_the_best_checkpoint_is_that_of_the_least_val_loss(tmp_path):
    seen, best = Rates(), ModelCheckpoint(tmp_path, monitor="val_loss")
    # At this learning rate the loss goes up and down.
    fit(make(lr=1.0), seen, best, max_epochs=8, enable_checkpointing=True)
    least = min(range(8), key=seen.losses.__getitem__)
    assert 0 < least and float(best.best_model_score) == seen.losses[least]
    loaded = PyroSVIModule.load_from_checkpoint(best.best_model_path, model=global_model)
    torch.testing.assert_close(dict(loaded.state_dict()), seen.states[least], rtol=0, atol=0)


def test_early_stopping_waits_for_an_epoch_that_is_no_better():
    seen = Rates()
    fit(make(lr=1.0), seen, EarlyStopping("val_loss", patience=1), max_epochs=20)
    better = [
        loss < min(seen.losses[:n], default=float("inf")) for n, loss in enumerate(seen.losses)
    ]
    assert better[:-1] == [True] * (len(better) - 1) and not better[-1]


def test_the_learning_rates_of_steps_are_logged(tmp_path):
    def halve(optimizer):
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"scheduler": scheduler, "interval": "step"}

    monitor, logger = LearningRateMonitor("step"), CSVLogger(tmp_path)
    fit(make(lr_scheduler=halve), monitor, logger=logger, log_every_n_steps=2)
    with open(tmp_path / "lightning_logs/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["lr-Adam"]]
    found = {int(row["step"]): float(row["lr-Adam"]) for row in rows}
    assert found == pytest.approx({step: 0.05 * 0.5**step for step in range(1, 18, 2)})


# -- the learning rate finder --------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the finder saves the fit before it


FINDER = {"min_lr": 1e-4, "max_lr": 1.0}


@pytest.mark.parametrize(
    ("options", "steps"),
    # Compiled steps that end within the first epoch, and beyond it.
    [({}, 15), ({"model": model}, 15), ({"compile": AS_TRACED}, 5), ({"compile": AS_TRACED}, 15)],
)
def test_a_fit_after_the_search_is_the_one_without_it(here, options, steps):
    finder = LearningRateFinder(**FINDER, num_training_steps=steps, update_attr=False)
    searched, plain = make(**options), make(**options)
    fit(searched, finder)
    fit(plain)
    assert len(finder.optimal_lr.results["lr"]) == steps
    if "compile" in options:
        assert any(entry.fused is not None for entry in searched._compiled._entries)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if "compile" in options else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(searched.state_dict(), plain.state_dict(), **tolerance)


def test_the_rate_that_is_found_is_that_of_the_fit(here):
    finder, seen = LearningRateFinder(**FINDER, num_training_steps=15), Rates()
    svi = make()
    fit(svi, finder, seen)
    found = finder.optimal_lr.suggestion()
    assert svi.lr == found != 0.05
    assert seen.rates == [found] * 18


def test_the_tuner_sets_the_rate_of_the_next_fit(here):
    svi, seen = make(), Rates()
    before = svi.lr
    tuner = Tuner(quiet_trainer(max_epochs=3))
    finder = tuner.lr_find(svi, datamodule=data(), num_training=15, **FINDER)
    assert before is None and svi.lr == finder.suggestion()
    fit(svi, seen)
    assert seen.rates == [svi.lr] * 18


def test_losses_of_the_search_are_those_of_steps_at_its_rates(here):
    svi, tuner = make(), Tuner(quiet_trainer(max_epochs=3))
    torch.manual_seed(1)
    finder = tuner.lr_find(svi, datamodule=data(), num_training=15, update_attr=False, **FINDER)
    assert svi.lr is None
    rates = finder.results["lr"]
    assert len(rates) == 15 and rates == sorted(rates)

    class AtRates(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.optimizers[0].param_groups[0]["lr"] = rates[len(self.losses)]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.losses.append(float(outputs["loss"]))

    steps = AtRates()
    fit(make(), steps, max_steps=15)
    # Lightning's running mean, of which 0.98 is what was.
    mean = 0.0
    for number, loss in enumerate(steps.losses, 1):
        mean = 0.98 * mean + 0.02 * loss
        expected = mean / (1 - 0.98 ** (number + 1))
        assert finder.results["loss"][number - 1] == pytest.approx(expected, rel=1e-5)


def test_a_rate_of_the_module_takes_the_place_of_the_optimizers():
    svi, seen = make(lr=0.5), Rates()
    svi.lr = 0.02
    fit(svi, seen, max_epochs=1)
    assert seen.rates == [0.02] * 6


def test_a_subclass_may_hold_a_network_by_the_name():
    class Logistic(PyroSVIModule):
        def __init__(self):
            super().__init__()
            self.lr = torch.nn.Linear(2, 1)

        def model(self, x, y):
            pyro.sample("bias", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.lr(x).squeeze(-1), 1.0), obs=y)

    seen = Rates()
    svi = Logistic()
    fit(svi, seen, max_epochs=1)
    assert isinstance(svi.lr, torch.nn.Linear) and seen.rates == [0.01] * 6


def test_a_compiled_model_may_read_a_number_by_the_name():
    class Scaled(PyroSVIModule):
        def __init__(self, **options):
            super().__init__(dataset_size=22, **options)
            self.lr = 2.0

        def model(self, x, y):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.lr * w, 1.0), obs=y)

    compiled, eager = Scaled(compile=AS_TRACED), Scaled()
    batches = [[each[start : start + 4] for each in arrays()] for start in (0, 4, 8)]
    assert_equal_steps(compiled, eager, batches, 1e-5, 1e-4)
    assert is_compiled(compiled)
    compiled.lr = eager.lr = 3.0
    assert_equal_steps(compiled, eager, batches, 1e-5, 1e-4)


def test_groups_with_rates_of_their_own_are_not_levelled():
    def groups(parameters):
        first, *others = parameters
        return torch.optim.Adam([{"params": [first], "lr": 0.1}, {"params": others}], lr=0.01)

    svi = PyroSVIModule(global_model, optimizer=groups)
    svi.lr = 0.02
    with pytest.raises(ValueError, match=r"groups, which differ \(0.01, 0.1\)"):
        fit(svi)


def test_a_rate_below_0_is_refused():
    svi = make()
    svi.lr = -1.0
    with pytest.raises(ValueError, match="lr, the learning rate of the module, must be above 0"):
        fit(svi)


@pytest.mark.parametrize("by", ["tuner", "callback"])
def test_a_search_with_several_steps_a_batch_is_refused(here, by):
    svi = make(steps_per_batch=2)
    with pytest.raises(ValueError, match="Search with a module of steps_per_batch=1"):
        if by == "tuner":
            Tuner(quiet_trainer(max_epochs=3)).lr_find(svi, datamodule=data())
        else:
            fit(svi, LearningRateFinder())
