"""Hooks and loggers see the steps of several in one training step as they see one at a time."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import regression, regression_batch
from compiled_support import AS_TRACED
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger
from steps_support import ADAM, B, assert_same_fit
from support import no_validation, quiet_trainer
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule

EXACTLY = {"rtol": 0, "atol": 0}


def fit(kind, steps, optimizer=ADAM, count=44, compile=False, val=None, **flags):
    torch.manual_seed(0)
    svi = kind(regression, optimizer=optimizer, steps_per_batch=steps, compile=compile)
    trainer = quiet_trainer(**{"max_epochs": 2, **flags})
    torch.manual_seed(1)
    data = ArrayDataModule(regression_batch(3, rows=count), batch_size=B, val=val)
    trainer.fit(svi, datamodule=data)
    return svi, trainer


# -- hooks ----------------------------------------------------------------------------------------


class WarmsUp(PyroSVIModule):
    """Steps at a learning rate of its own."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 1e-6 * (1 + self.trainer.global_step + batch_idx + epoch)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class LeavesOut(PyroSVIModule):
    """Steps on every other batch."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if batch_idx % 2:
            optimizer_closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class AddsUp(PyroSVIModule):
    """Keeps gradients for two batches."""

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 2 == 0:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)


class Halves(PyroSVIModule):
    """Trains on half the loss."""

    def backward(self, loss, *args, **kwargs):
        super().backward(loss * 0.5, *args, **kwargs)


class Weighs(PyroSVIModule):
    """Weighs batches by what they hold."""

    def batch_weight(self, batch):
        return super().batch_weight(batch) * float(1 + batch[0].abs().mean())


@pytest.mark.parametrize("kind", [WarmsUp, LeavesOut, AddsUp, Halves, Weighs])
@pytest.mark.parametrize("compile", [False, AS_TRACED], ids=["eager", "compiled"])
def test_what_a_subclass_does_to_a_step_is_done_to_each(kind, compile):
    optimizer = partial(SGD, lr=1e-4)
    found, expected = fit(kind, 4, optimizer, compile=compile), fit(kind, 1, optimizer)
    plain = fit(PyroSVIModule, 1, optimizer)[0].state_dict()
    assert any(not torch.equal(plain[n], v) for n, v in expected[0].state_dict().items())
    # A compiled loss adds up in another order.
    assert_same_fit(found, expected, **({"rtol": 1e-4, "atol": 1e-5} if compile else EXACTLY))


class Watches(Callback):
    def __init__(self):
        self.gradients = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradients.append(sum(float(g.sum()) for g in grads))


class WatchesItself(PyroSVIModule):
    def on_before_zero_grad(self, optimizer):
        self.seen = [*getattr(self, "seen", []), type(optimizer)]


@pytest.mark.parametrize("compile", [False, AS_TRACED], ids=["eager", "compiled"])
def test_hooks_before_gradients_are_cleared_run_for_each_step(compile):
    watches, seen = [Watches(), Watches()], []
    for steps, watch in zip((4, 1), watches, strict=True):
        svi, _ = fit(WatchesItself, steps, callbacks=[watch], compile=compile)
        seen.append(svi.seen)
    assert seen[0] == seen[1] == [torch.optim.Adam] * 22
    # Adam divides by gradients, whose rounding grows.
    tolerance = 1e-3 if compile else 0
    assert watches[0].gradients == pytest.approx(watches[1].gradients, rel=tolerance, abs=tolerance)


class Forgets(PyroSVIModule):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step()


def test_an_optimizer_step_that_computes_no_loss_is_refused():
    with pytest.raises(RuntimeError, match="Forgets.optimizer_step did not compute the loss"):
        fit(Forgets, 4)


class Returns(PyroSVIModule):
    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


class Clips(PyroSVIModule):
    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        self.clip_gradients(optimizer, 1.0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Returns, "Returns overrides training_step, .* steps_per_batch=4: .* trains nothing"),
        (Clips, "Clips overrides configure_gradient_clipping, .* on_before_optimizer_step"),
    ],
)
def test_hooks_that_would_do_nothing_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        fit(kind, 4)


class ClipsBefore(PyroSVIModule):
    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.clip_gradients(optimizer, 1.0, "norm")


def test_gradients_are_clipped_as_the_refusal_says():
    optimizer = partial(SGD, lr=1e-3)
    expected = fit(PyroSVIModule, 1, optimizer, gradient_clip_val=1.0)
    assert_same_fit(fit(ClipsBefore, 4, optimizer), expected, **EXACTLY)


class WatchesGradients(Callback):
    """Is called with gradients, as the ``watch`` of loggers is."""

    def __init__(self, register):
        self.register, self.calls = register, 0

    def on_train_start(self, trainer, pl_module):
        getattr(next(pl_module.parameters()), self.register)(self.called)

    def called(self, _):
        self.calls += 1


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("steps", [1, 4])
def test_hooks_of_parameters_run_in_each_compiled_step(register, steps):
    watch = WatchesGradients(register)
    svi, _ = fit(PyroSVIModule, steps, compile=AS_TRACED, callbacks=[watch])
    assert svi._compiled.compilations == 1
    # A comparison of the compiled loss with eager may differentiate once more.
    assert watch.calls >= 22


# -- loggers --------------------------------------------------------------------------------------


class Keeps(Logger):
    """Keeps what it is told, by name."""

    name, version = "keeps", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        for name in metrics:
            self.steps.setdefault(name, []).append(step)

    def log_hyperparams(self, *args, **kwargs):
        pass


class LogsMore(PyroSVIModule):
    """Has figures of its own."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("of a batch", 1.0, on_step=True, on_epoch=False)

    def validation_step(self, batch, batch_idx):
        self.log("of a validation", 1.0)

    def on_validation_epoch_end(self):
        pass  # no call of super


@pytest.mark.parametrize("every", [6, 8])
def test_figures_of_users_are_logged_at_the_same_steps(every):
    loggers = [Keeps(), Keeps()]
    for steps, logger in zip((4, 1), loggers, strict=True):
        fit(
            LogsMore,
            steps,
            count=48,
            val=regression_batch(4, rows=8),
            logger=logger,
            log_every_n_steps=every,
            callbacks=[LearningRateMonitor("step")],
        )
    found, expected = (logger.steps for logger in loggers)
    assert {"of a batch", "of a validation", "lr-Adam", "train_loss"} <= expected.keys()
    found.pop("epoch"), expected.pop("epoch")  # comes with each line
    assert found == expected


def test_no_figure_is_logged_where_loggers_want_none_of_steps():
    logger = Keeps()
    fit(PyroSVIModule, 4, logger=logger, log_every_n_steps=0)
    assert logger.steps.keys() == {"train_loss", "train_loss_per_obs", "epoch"}


# -- rows -----------------------------------------------------------------------------------------


def last_of_series(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", x.shape[1]):
        pyro.sample("y", dist.Normal(w * x[-1], 1.0), obs=y[0])


class TimeFirst(PyroSVIModule):
    def num_rows(self, batch):
        return batch[0].shape[1]


@no_validation
def test_rows_that_are_not_in_dimension_0_are_refused():
    rows = TensorDataset(torch.randn(64, 5), torch.randn(64, 1))
    loader = DataLoader(
        rows,
        batch_size=16,
        collate_fn=lambda items: [torch.stack(c, 1) for c in zip(*items, strict=True)],
    )
    svi = TimeFirst(last_of_series, steps_per_batch=4)
    with pytest.raises(ValueError, match="num_rows counts 16 rows, not 4, in a part of 4 of 16"):
        quiet_trainer(max_epochs=1).fit(svi, loader)


class Counts(PyroSVIModule):
    def num_rows(self, batch):
        return len(batch[1])


def test_a_count_of_rows_of_the_users_own_is_the_same():
    assert_same_fit(fit(Counts, 4), fit(PyroSVIModule, 1), **EXACTLY)
