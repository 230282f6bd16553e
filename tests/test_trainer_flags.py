"""Ordinary Lightning: flags, callbacks, schedulers and checkpoints do what they do elsewhere."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pyro.infer.autoguide import AutoDelta
from support import normal_mean, quiet_trainer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 200, 50
DATA = torch.randn(N, generator=torch.Generator().manual_seed(2)) + 1.0
BATCHES = DATA.split(B)
ADAM = partial(torch.optim.Adam, lr=0.05)
SGD = partial(torch.optim.SGD, lr=1e-3)


class SeedEachStep(Callback):
    """Gives each step noise that depends on its number alone, whatever was drawn before it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


class KeepLearningRates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def rows():
    """Unshuffled batches."""
    return DataLoader(TensorDataset(DATA), batch_size=B)


def fit(svi, data=None, **flags):
    trainer = quiet_trainer(**{"max_epochs": 2, **flags})
    trainer.fit(svi, rows() if data is None else data)
    return trainer


def values(svi):
    return {name: value.clone() for name, value in svi.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def delta(**options):
    """A point estimate that starts at 0: its loss and gradient are known exactly."""
    start = {"init_loc_fn": pyro.infer.autoguide.init_to_value(values={"mu": torch.zeros(())})}
    return PyroSVIModule(normal_mean, guide=partial(AutoDelta, **start), **options)


def gradient(mu, *batches):
    """Derivative of the negative log joint at ``mu``, each batch scaled to N; mean over batches."""
    return float(100 * mu - sum(N / B * (batch - mu).sum() for batch in batches) / len(batches))


def test_the_fit_is_a_plain_torch_loop_over_the_loss_bit_for_bit():
    svi = PyroSVIModule(normal_mean, optimizer=ADAM)
    torch.manual_seed(0)
    fit(svi, max_epochs=3, callbacks=SeedEachStep())

    plain = PyroSVIModule(normal_mean, dataset_size=N)
    torch.manual_seed(0)
    plain.loss(BATCHES[0])  # makes the parameters
    optimizer = ADAM(plain.parameters())
    for step, batch in enumerate(BATCHES * 3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        plain.loss(batch).backward()
        optimizer.step()
    assert same(values(svi), values(plain))


def test_each_epoch_visits_each_row_once_in_a_new_order():
    visited = []

    class Keep(PyroSVIModule):
        def training_step(self, batch, batch_idx):
            visited.append((self.current_epoch, batch))
            return super().training_step(batch, batch_idx)

    data = torch.arange(20.0)
    for loader in (
        ArrayDataModule(data, batch_size=6),
        DataLoader(data, batch_size=6, shuffle=True),
    ):
        visited.clear()
        torch.manual_seed(1)
        fit(Keep(normal_mean), loader)
        epochs = [torch.cat([rows for at, rows in visited if at == epoch]) for epoch in (0, 1)]
        assert all(torch.equal(epoch.sort().values, data) for epoch in epochs)
        assert not torch.equal(epochs[0], epochs[1])


def test_one_step_of_sgd_follows_the_exact_gradient():
    svi = delta(optimizer=SGD)
    fit(svi, max_steps=1)
    assert float(svi.guide.mu.detach()) == pytest.approx(-1e-3 * gradient(0.0, BATCHES[0]))


def test_gradient_clip_val_bounds_the_step():
    svi = delta(optimizer=SGD)
    fit(svi, max_steps=1, gradient_clip_val=0.5)
    assert gradient(0.0, BATCHES[0]) < -0.5
    assert float(svi.guide.mu.detach()) == pytest.approx(0.5e-3, rel=1e-4)


def test_accumulate_grad_batches_steps_by_the_mean_gradient():
    svi = delta(optimizer=SGD)
    trainer = fit(svi, max_epochs=1, accumulate_grad_batches=2, limit_train_batches=2)
    assert trainer.global_step == 1
    assert float(svi.guide.mu.detach()) == pytest.approx(-1e-3 * gradient(0.0, *BATCHES[:2]))


@pytest.mark.parametrize(
    "precision, dtype, tolerance",
    # bfloat16 keeps 8 bits: 0.4 % of each term of the loss.
    [("64-true", torch.float64, 1e-3), ("bf16-mixed", torch.float32, 0.02)],
)
def test_precision(precision, dtype, tolerance):
    decay = partial(LambdaLR, lr_lambda=lambda epoch: 0.9**epoch)
    svi = delta(optimizer=partial(torch.optim.Adam, lr=0.1), lr_scheduler=decay)
    trainer = fit(svi, max_epochs=60, precision=precision)
    assert {p.dtype for p in svi.parameters()} == {dtype}
    assert svi.posterior_samples(3)["mu"].dtype == dtype
    assert float(svi.guide.mu.detach()) == pytest.approx(float(DATA.sum() / (100 + N)), tolerance)
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


@pytest.mark.parametrize(
    "flags, steps",
    [
        ({"limit_train_batches": 2}, 4),
        ({"limit_train_batches": 0.5}, 4),
        ({"overfit_batches": 1}, 2),
        ({"fast_dev_run": True}, 1),
        ({"max_steps": 3}, 3),
    ],
)
def test_a_fit_cut_short_keeps_the_whole_n(flags, steps):
    svi = delta(optimizer=SGD)
    trainer = fit(svi, **flags)
    assert trainer.global_step == steps
    assert svi.dataset_size == N
    mu = 0.0  # full batches: the weights are 1 however few there are
    per_epoch = {4: 2, 2: 1}.get(steps, len(BATCHES))
    for step in range(steps):
        mu -= 1e-3 * gradient(mu, BATCHES[step % per_epoch])
    assert float(svi.guide.mu.detach()) == pytest.approx(mu, rel=1e-4)


def with_validation():
    return ArrayDataModule(DATA, batch_size=B, val=DATA, shuffle=False)


def test_val_check_interval_validates_within_an_epoch():
    class Count(Callback):
        runs = 0

        def on_validation_end(self, trainer, pl_module):
            self.runs += not trainer.sanity_checking

    count = Count()
    fit(delta(), with_validation(), val_check_interval=0.5, callbacks=count)
    assert count.runs == 4


def test_early_stopping_watches_val_loss():
    still = delta(optimizer=partial(torch.optim.SGD, lr=0.0))
    stop = EarlyStopping("val_loss", patience=2)
    trainer = fit(still, with_validation(), max_epochs=20, callbacks=stop)
    assert trainer.current_epoch == 3  # the first figure, then two that are no better


def test_lr_scheduler_from_the_optimizer_steps_once_an_epoch():
    keep = KeepLearningRates()
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    fit(delta(optimizer=ADAM, lr_scheduler=halve), callbacks=keep)
    assert keep.rates == [0.05] * 4 + [0.025] * 4


def test_lr_scheduler_in_lightnings_dict_steps_each_batch():
    def one_cycle(optimizer):
        cycle = OneCycleLR(optimizer, max_lr=0.1, total_steps=8, anneal_strategy="linear")
        return {"scheduler": cycle, "interval": "step"}

    keep = KeepLearningRates()
    fit(delta(optimizer=ADAM, lr_scheduler=one_cycle), callbacks=keep)
    probe = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    cycle = OneCycleLR(probe, max_lr=0.1, total_steps=8, anneal_strategy="linear")
    expected = []
    for _ in range(8):
        expected.append(cycle.get_last_lr()[0])
        probe.step()
        if len(expected) < 8:
            cycle.step()
    assert keep.rates == pytest.approx(expected)


def test_reduce_lr_on_plateau_watches_the_training_loss():
    keep = KeepLearningRates()
    # Far too small to improve by the threshold: each epoch after the first is a plateau.
    tiny = partial(torch.optim.SGD, lr=1e-12)
    plateau = partial(ReduceLROnPlateau, patience=0, factor=0.1, eps=0.0)
    fit(delta(optimizer=tiny, lr_scheduler=plateau), max_epochs=4, callbacks=keep)
    assert keep.rates[::4] == pytest.approx([1e-12, 1e-12, 1e-13, 1e-14])


def regression(x):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.param("s", torch.ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w[0] + w[1], s), obs=x)


# Lightning asks for the callback that saved the checkpoint, and then warns of what it saved.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_fresh_module_resumes_from_a_checkpoint_as_if_never_stopped(tmp_path):
    flags = {"callbacks": [SeedEachStep()], "max_epochs": 4}
    torch.manual_seed(0)
    straight = PyroSVIModule(regression, optimizer=ADAM)
    fit(straight, **flags)

    torch.manual_seed(0)
    first = PyroSVIModule(regression, optimizer=ADAM)
    saving = ModelCheckpoint(tmp_path, filename="half")
    fit(first, max_epochs=2, callbacks=[SeedEachStep(), saving], enable_checkpointing=True)
    saved = values(first)

    torch.manual_seed(99)  # its own initial values would differ
    fresh = PyroSVIModule(regression, optimizer=ADAM)
    restored = {}

    class Restored(Callback):
        def on_train_start(self, trainer, pl_module):
            restored.update(values(pl_module))

    saving = ModelCheckpoint(tmp_path)
    callbacks = [SeedEachStep(), Restored(), saving]
    trainer = quiet_trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(fresh, rows(), ckpt_path=tmp_path / "half.ckpt")
    assert same(restored, saved)
    assert same(values(fresh), values(straight))
    assert not same(values(fresh), saved)


def test_validate_restores_a_fresh_module_from_a_checkpoint(tmp_path):
    svi = delta(optimizer=ADAM)
    trainer = fit(svi, with_validation())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    fresh = delta()
    checked = quiet_trainer()
    checked.validate(fresh, with_validation(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert same(values(fresh), values(svi))
    assert checked.callback_metrics["val_loss"] == trainer.callback_metrics["val_loss"]
