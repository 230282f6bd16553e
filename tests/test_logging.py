"""What is logged: the loss of the whole training set, exact over an epoch at fixed parameters."""

import csv
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from pyro.infer.autoguide import AutoDelta
from support import normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule

# Ragged batches: 101 = 4 * 25 + 1 rows of training, 37 = 25 + 12 of validation.
N, V, B = 101, 37, 25
DATA = torch.linspace(-3.0, 4.0, N) ** 2 / 4
HELD_OUT = torch.linspace(-1.0, 2.0, V)
MU = 0.3
STILL = partial(torch.optim.SGD, lr=0.0)
NAMES = {
    "train_loss",
    "train_loss_per_obs",
    "train_loss_per_obs_step",
    "val_loss",
    "val_loss_per_obs",
}


def still(**options):
    """A point estimate that stays where it is, at MU."""
    guide = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(MU))
    return PyroSVIModule(normal_mean, guide, optimizer=STILL, **options)


def by_hand(rows, count=N):
    """Negative log joint at MU, with ``rows`` standing for ``count`` observations."""
    log_prior = -0.5 * (MU / 0.1) ** 2 - math.log(0.1) - 0.5 * math.log(2 * math.pi)
    log_rows = -0.5 * (rows.double() - MU) ** 2 - 0.5 * math.log(2 * math.pi)
    return -(log_prior + count / len(rows) * float(log_rows.sum()))


def data(**options):
    return ArrayDataModule(DATA, batch_size=B, val=HELD_OUT, test=HELD_OUT, **options)


def fitted(svi, arrays=None, **flags):
    trainer = quiet_trainer(**{"max_epochs": 1, "log_every_n_steps": 1, **flags})
    trainer.fit(svi, arrays or data())
    return trainer


def test_the_names_logged_by_a_fit():
    assert set(fitted(still()).callback_metrics) == NAMES


@pytest.mark.parametrize("shuffle", [True, False])
def test_train_loss_of_an_epoch_is_that_of_the_full_data(shuffle):
    metrics = fitted(still(), data(shuffle=shuffle)).callback_metrics
    # Single precision: five sums of a few hundred nats.
    assert float(metrics["train_loss"]) == pytest.approx(by_hand(DATA), rel=1e-5)


class AtTheEnd(Callback):
    """Keeps what a callback finds in its hook of an epoch's end."""

    def on_train_epoch_end(self, trainer, pl_module):
        names = "train_loss", "train_loss_per_obs"
        self.found = [float(trainer.callback_metrics[name]) for name in names]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("arrays", [ArrayDataModule(DATA, B), ArrayDataModule(DATA, B, val=DATA)])
def test_callbacks_find_the_loss_of_an_epoch_at_its_end(arrays, steps):
    callback = AtTheEnd()
    fitted(still(steps_per_batch=steps), arrays, callbacks=[callback], max_epochs=2)
    expected = by_hand(DATA)
    assert callback.found == pytest.approx([expected, expected / N], rel=1e-5)


def test_callbacks_find_the_loss_of_an_epoch_that_is_cut_short():
    callback = AtTheEnd()
    arrays = data(shuffle=False)
    fitted(still(), arrays, callbacks=[callback], max_epochs=2, limit_train_batches=2)
    assert callback.found[0] == pytest.approx(by_hand(DATA[: 2 * B]), rel=1e-5)


def test_val_loss_stands_for_the_training_rows():
    metrics = fitted(still()).callback_metrics
    assert float(metrics["val_loss"]) == pytest.approx(by_hand(HELD_OUT, count=N), rel=1e-5)


def test_validation_on_the_training_rows_gives_the_training_loss():
    arrays = ArrayDataModule(DATA, batch_size=B, val=DATA)
    metrics = fitted(still(), arrays).callback_metrics
    assert float(metrics["val_loss"]) == pytest.approx(float(metrics["train_loss"]), rel=1e-5)


@pytest.mark.parametrize("stage, name", [("validate", "val"), ("test", "test")])
def test_validate_and_test_report_the_loss_at_the_training_n(stage, name):
    figures = getattr(quiet_trainer(), stage)(still(), datamodule=data(), verbose=False)[0]
    assert set(figures) == {f"{name}_loss", f"{name}_loss_per_obs"}
    assert figures[f"{name}_loss"] == pytest.approx(by_hand(HELD_OUT, count=N), rel=1e-5)


def test_figures_per_observation_are_divided_by_the_training_n():
    metrics = fitted(still()).callback_metrics
    for name in ("train_loss", "val_loss"):
        per_obs = float(metrics[f"{name}_per_obs"])
        assert per_obs == pytest.approx(float(metrics[name]) / N, rel=1e-6)


class KeepSteps(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = trainer.callback_metrics
        self.steps.append((batch, float(metrics["train_loss_per_obs_step"]), outputs["loss"]))


def test_a_step_logs_its_batch_scaled_to_n_per_observation():
    keep = KeepSteps()
    fitted(still(), callbacks=keep)
    assert len(keep.steps) == 5
    for batch, logged, _ in keep.steps:
        assert logged == pytest.approx(by_hand(batch) / N, rel=1e-5)


def test_the_mean_of_the_losses_that_train_is_the_loss_of_the_full_data():
    torch.manual_seed(0)  # which row is alone in its batch is drawn
    keep = KeepSteps()
    fitted(still(), callbacks=keep)
    losses = torch.stack([loss for _, _, loss in keep.steps])
    assert float(losses.mean()) == pytest.approx(by_hand(DATA), rel=1e-5)
    # The lone row does not count as much as 25: a fifth of the batches, a hundredth of the rows.
    assert float(losses.min()) < 0.1 * float(losses.max())


def test_limit_train_batches_logs_the_rows_that_were_seen():
    metrics = fitted(still(), data(shuffle=False), limit_train_batches=2).callback_metrics
    assert float(metrics["train_loss"]) == pytest.approx(by_hand(DATA[: 2 * B]), rel=1e-5)


def test_a_loader_of_equal_batches_logs_what_ragged_ones_do():
    whole = DataLoader(TensorDataset(DATA), batch_size=N)
    metrics = fitted(still(), whole).callback_metrics
    ragged = fitted(still()).callback_metrics
    assert float(metrics["train_loss"]) == pytest.approx(float(ragged["train_loss"]), rel=1e-5)


class Local(nn.Module):
    """Latents of rows alone, in a plate that is not named as the data's."""

    def model(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    loc = pyro.param("loc", torch.tensor(0.2))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Delta(loc * x))


def test_without_a_data_plate_the_epoch_is_the_sum_over_rows():
    svi = PyroSVIModule(Local().model, local_guide, optimizer=STILL, data_plate=None)
    metrics = fitted(svi).callback_metrics
    for name, rows in (("train_loss", DATA), ("val_loss", HELD_OUT)):
        z = 0.2 * rows.double()
        one = 0.5 * z**2 + 0.5 * (rows.double() - z) ** 2 + math.log(2 * math.pi)
        assert float(metrics[name]) == pytest.approx(N / len(rows) * float(one.sum()), rel=1e-5)


def test_a_csv_logger_receives_every_figure(tmp_path):
    logger = CSVLogger(tmp_path)
    fitted(still(), logger=logger, log_every_n_steps=2, max_epochs=2)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    columns = {name: [float(line[name]) for line in lines if line[name]] for name in NAMES}
    assert len(columns["train_loss"]) == len(columns["val_loss"]) == 2  # once an epoch
    assert len(columns["train_loss_per_obs_step"]) == 5  # every second of ten steps
    assert columns["train_loss"] == pytest.approx([by_hand(DATA)] * 2, rel=1e-5)
    assert columns["val_loss"] == pytest.approx([by_hand(HELD_OUT)] * 2, rel=1e-5)


class KeepBar(Callback):
    def __init__(self):
        self.bars = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.bars.append(set(trainer.progress_bar_metrics))

    def on_train_end(self, trainer, pl_module):
        self.bars.append(set(trainer.progress_bar_metrics))


def test_the_progress_bar_shows_one_training_figure_per_observation_from_the_first_step_on():
    keep = KeepBar()
    fitted(still(), callbacks=keep)
    # The bar's own callback runs before the module's hook, so that it shows the step before.
    assert keep.bars[1] == {"train_loss_per_obs"}
    assert keep.bars[-1] == {"train_loss_per_obs", "val_loss_per_obs"}


def test_the_progress_bar_of_validate_and_test_shows_their_figures():
    for stage, name in (("validate", "val"), ("test", "test")):
        trainer = quiet_trainer()
        getattr(trainer, stage)(still(), datamodule=data(), verbose=False)
        assert set(trainer.progress_bar_metrics) == {f"{name}_loss_per_obs"}
