"""SVIProgressBar shows losses per observation, observations a second and the time left."""

import io
import sys

import pytest
import rich
import torch
from lightning.pytorch import Callback, LightningModule
from steps_support import EPOCHS, ROWS, B, fit
from support import normal_mean, quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule, SVIProgressBar
from pyro_lightning.pace import Pace, clock


@pytest.fixture
def screen():
    """What a terminal of 200 columns would be sent; Rich's console is put back."""
    yield io.StringIO()
    rich.reconfigure()


class Metrics(Callback):
    """Keeps what the bar shows after each batch, and the losses that are logged."""

    def __init__(self):
        self.shown, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.shown.append(trainer.progress_bar_callback._metric_component._metrics)


class Clock:
    """A time that goes on by a second with each look at it."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


def watched(screen, steps_per_batch=1, **flags):
    terminal = {"file": screen, "force_terminal": True, "width": 200}
    bar, metrics = SVIProgressBar(console_kwargs=terminal), Metrics()
    trainer = {"enable_progress_bar": True, "callbacks": [bar, metrics], **flags}
    svi, trainer = fit(steps_per_batch, trainer=trainer)
    return svi, trainer, metrics


@pytest.mark.parametrize("steps_per_batch", [1, 4])
def test_the_terminal_shows_losses_rows_and_time(screen, steps_per_batch):
    watched(screen, steps_per_batch)
    text = screen.getvalue()
    for name in ("loss/obs:", "val loss/obs:", "obs/s:", "left: 0:00:0"):
        assert name in text
    assert "train_loss_per_obs" not in text


def test_losses_are_those_of_the_loggers(screen):
    _, trainer, metrics = watched(screen)
    found = trainer.progress_bar_callback.get_metrics(trainer, trainer.lightning_module)
    assert found["val loss/obs"] == float(trainer.callback_metrics["val_loss_per_obs"])
    assert {"loss/obs", "val loss/obs", "obs/s", "left"} <= metrics.shown[-1].keys()


@pytest.mark.parametrize(
    ("steps_per_batch", "batches", "rows"),
    [(1, EPOCHS * 11, ROWS / 11), (4, EPOCHS * 3, ROWS / 3)],
)
def test_rows_and_batches_are_counted(monkeypatch, screen, steps_per_batch, batches, rows):
    # On a clock on which each look takes a second: one a batch, but for validations and epochs.
    monkeypatch.setattr("pyro_lightning.progress_bar.time", Clock())
    _, _, metrics = watched(screen, steps_per_batch, num_sanity_val_steps=0)
    assert len(metrics.shown) == batches
    assert metrics.shown[-1]["left"] == "0:00:00"
    assert metrics.shown[1]["left"] == clock(batches - 2)
    # Of an epoch's rows, one batch a second; those of the last seconds count for more.
    assert float(metrics.shown[-1]["obs/s"]) == pytest.approx(rows, rel=0.15)
    assert B * steps_per_batch == int(metrics.shown[0]["obs/s"])


def test_a_fit_without_an_end_has_no_time_left(screen):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.global_step >= 5

    terminal = {"file": screen, "force_terminal": True, "width": 200}
    bar, metrics = SVIProgressBar(console_kwargs=terminal), Metrics()
    trainer = quiet_trainer(
        max_epochs=-1, enable_progress_bar=True, callbacks=[bar, metrics, Stop()]
    )
    data = ArrayDataModule(torch.zeros(50), batch_size=2)
    trainer.fit(PyroSVIModule(normal_mean), datamodule=data)
    assert "obs/s" in metrics.shown[-1] and "left" not in metrics.shown[-1]


def test_steps_end_a_fit_as_well(monkeypatch, screen):
    monkeypatch.setattr("pyro_lightning.progress_bar.time", Clock())
    _, _, metrics = watched(screen, 4, max_steps=20, num_sanity_val_steps=0)
    # Batches of 4, 4 and 3 steps: after two of them 12 steps are left, 3 batches' worth.
    assert metrics.shown[1]["left"] == "0:00:03"


def test_time_left_is_that_of_the_batches_and_of_what_came_between():
    pace = Pace(now=0.0)
    assert pace.left(10) is None
    for now in (5.0, 6.0, 9.0):  # the first took long, and a validation came before the last
        pace.add(rows=10, now=now)
    assert pace.left(3) == 6.0
    assert pace.left(float("inf")) is None


def test_without_rich_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-lightning\[rich\]'"):
        SVIProgressBar()


def test_another_module_is_refused():
    class Other(LightningModule):
        pass

    with pytest.raises(TypeError, match="serves a PyroSVIModule, got Other"):
        SVIProgressBar().setup(quiet_trainer(), Other(), "fit")
