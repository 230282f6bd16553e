"""Whole steps in compiled code: the trajectory of eager steps with torch's own optimizers."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import resume_support as goes_on
import torch
from compiled_models import CASES, N, bits_batch, rows, vae, values_batch
from compiled_support import AS_TRACED
from lightning.pytorch import Callback
from pyro.infer.autoguide import AutoNormal
from steps_support import ADAM, assert_same_fit, fit, resumed
from support import no_validation, quiet_trainer
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.utils.data import DataLoader, Sampler, TensorDataset

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule

OPTIMIZERS = {
    "Adam": ADAM,
    "Adam, amsgrad": partial(Adam, lr=0.05, amsgrad=True),
    "Adam, decay": partial(Adam, lr=0.05, weight_decay=0.1),
    "AdamW": partial(AdamW, lr=0.05, weight_decay=0.1),
    "SGD": partial(SGD, lr=1e-4),
    "SGD, momentum": partial(SGD, lr=1e-4, momentum=0.9, weight_decay=0.1),
    "SGD, nesterov": partial(SGD, lr=1e-4, momentum=0.9, nesterov=True),
}
OTHERS = {
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "NAdam": partial(torch.optim.NAdam, lr=0.01),
}


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_groups(parameters):
    first, *others = parameters
    return Adam([{"params": [first], "lr": 0.01}, {"params": others, "weight_decay": 0.1}], lr=0.05)


def takes_whole_steps(svi):
    return any(entry.fused is not None for entry in svi._compiled._entries)


def assert_same_parameters(svi, eager):
    # Not the moments: they are of gradients, which are what is left of terms a thousand times
    # larger.
    torch.testing.assert_close(svi.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
@pytest.mark.parametrize("steps", [1, 4])
def test_optimizers_are_the_same(double_precision, name, steps):
    optimizer = {**OPTIMIZERS, **OTHERS}[name]
    found = fit(steps, optimizer, compile=AS_TRACED)
    assert_same_fit(found, fit(1, optimizer), rtol=1e-9, atol=1e-11)
    assert takes_whole_steps(found[0]) == (name in OPTIMIZERS)
    assert found[0]._compiled.compilations == 1


@pytest.mark.parametrize("name", ["Adam", "SGD, momentum"])
def test_single_precision_is_the_same_to_rounding(name):
    svi, _ = fit(4, OPTIMIZERS[name], compile=AS_TRACED)
    assert_same_parameters(svi, fit(1, OPTIMIZERS[name])[0])
    assert takes_whole_steps(svi)


def test_groups_of_parameters_are_the_same(double_precision):
    found = fit(4, by_groups, compile=AS_TRACED)
    assert_same_fit(found, fit(1, by_groups), rtol=1e-9, atol=1e-11)
    assert takes_whole_steps(found[0])


@no_validation
@pytest.mark.parametrize("optimizer", [ADAM, OPTIMIZERS["AdamW"]])
@pytest.mark.parametrize("steps", [1, 4])
def test_rows_are_the_same(double_precision, optimizer, steps):
    found = fit(steps, optimizer, model=rows, compile=AS_TRACED)
    assert_same_fit(found, fit(1, optimizer, model=rows), rtol=1e-9, atol=1e-11)
    assert takes_whole_steps(found[0])


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.9), "interval": "step"},
        # It moves the first beta as well.
        lambda o: {
            "scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=60),
            "interval": "step",
        },
        partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
    ],
    ids=["exponential", "one cycle", "plateau"],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_schedulers_are_the_same(double_precision, schedule, steps):
    found = fit(steps, lr_scheduler=schedule, compile=AS_TRACED)
    assert_same_fit(found, fit(1, lr_scheduler=schedule), rtol=1e-9, atol=1e-11)
    assert takes_whole_steps(found[0])
    assert found[0]._compiled.compilations == 1


@pytest.mark.parametrize("most", [7, 12, 33])
def test_max_steps_is_the_same(double_precision, most):
    options = {"trainer": {"max_epochs": -1, "max_steps": most}}
    found = fit(4, compile=AS_TRACED, **options)
    assert found[1].global_step == most
    assert_same_fit(found, fit(1, **options), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_last_batch_of_another_size_is_the_same(double_precision, drop_last, steps):
    options = {"count": 47, "data": {"drop_last": drop_last}}
    found = fit(steps, compile=AS_TRACED, **options)
    assert_same_fit(found, fit(1, **options), rtol=1e-9, atol=1e-11)
    assert takes_whole_steps(found[0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_networks_with_dropout_and_statistics_are_the_same(double_precision, norm, steps):
    found = []
    for options in ({"compile": AS_TRACED, "steps_per_batch": steps}, {}):
        torch.manual_seed(0)
        # The gradient of a bias before BatchNorm is rounding, which Adam would make steps of.
        optimizer = partial(SGD, lr=1e-4, momentum=0.9) if norm else ADAM
        svi = PyroSVIModule(*vae(0.3, norm), optimizer=optimizer, **options)
        data = ArrayDataModule(bits_batch(0, rows=N)[0], batch_size=4)
        trainer = quiet_trainer(max_epochs=3)
        trainer.fit(svi, datamodule=data)
        found.append((svi, trainer))
    assert takes_whole_steps(found[0][0])
    assert_same_fit(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_resumed_fit_is_the_uninterrupted_one(double_precision, tmp_path, steps):
    options = {"data": {"shuffle": False}, "compile": AS_TRACED}
    whole = fit(steps, trainer={"max_epochs": 4}, **options)
    _, trainer = fit(steps, trainer={"max_epochs": 2}, **options)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    state = torch.get_rng_state()

    again = resumed(steps, path, state, 4, **options)
    assert_same_fit(again, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("steps", "model"), [(1, goes_on.global_model), (2, goes_on.model)])
def test_a_fit_goes_on_bit_for_bit_from_any_step(tmp_path, steps, model):
    made, data = partial(goes_on.make, model, steps_per_batch=steps), goes_on.rows()
    # After the first batch of the loader, the second, ...: it is traced, compared, used.
    places = {"at": [0, 1, 5], "max_epochs": 3}
    whole = goes_on.assert_goes_on(tmp_path, made(compile=AS_TRACED), data, **places)
    assert takes_whole_steps(whole.svi)
    # Of another process, where objects have other places, a shape has the same name.
    assert not any(str(id(None)) in name for name in whole.svi._compiled.kept())
    eager = goes_on.Fit(made(), data, max_epochs=3)
    pairs = zip(whole.state.values(), eager.state.values(), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)  # or else rounding would not be seen


@pytest.mark.parametrize("steps", [1, 4])
def test_a_second_fit_starts_with_a_new_optimizer(double_precision, steps):
    found = []
    for options in ({"compile": AS_TRACED}, {}):
        svi, _ = fit(steps if options else 1, **options)
        trainer = quiet_trainer(max_epochs=2)
        arrays = CASES["AutoNormal"].batch(5, rows=44)
        trainer.fit(svi, datamodule=ArrayDataModule(arrays, batch_size=4))
        found.append((svi, trainer))
    assert_same_fit(*found, rtol=1e-9, atol=1e-11)
    assert found[0][0]._compiled.compilations == 2


class Clips(PyroSVIModule):
    """Looks at gradients between loss and update."""

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class Watches(Callback):
    def __init__(self):
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1


def clipped(**options):
    torch.manual_seed(0)
    svi = Clips(CASES["AutoNormal"].make().model, optimizer=ADAM, **options)
    trainer = quiet_trainer(max_epochs=2)
    arrays = CASES["AutoNormal"].batch(5, rows=44)
    torch.manual_seed(1)
    trainer.fit(svi, datamodule=ArrayDataModule(arrays, batch_size=4))
    return svi, trainer


@pytest.mark.parametrize("steps", [1, 4])
def test_hooks_of_a_subclass_between_loss_and_update_run(double_precision, steps):
    found = clipped(steps_per_batch=steps, compile=AS_TRACED)
    assert not takes_whole_steps(found[0])
    assert_same_fit(found, clipped(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 4])
def test_hooks_of_callbacks_between_loss_and_update_run(steps):
    watch = Watches()
    fit(steps, trainer={"callbacks": [watch]}, compile=AS_TRACED)
    assert watch.steps == 33


@pytest.mark.parametrize("steps", [1, 4])
def test_a_parameter_that_is_frozen_between_epochs_stays(double_precision, steps):
    class Freezes(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            first = next(pl_module.parameters())
            first.requires_grad_(trainer.current_epoch == 0)
            self.value = first.detach().clone()

    found = []
    for options in ({"compile": AS_TRACED}, {}):
        watch = Freezes()
        flags = {"callbacks": [watch], "max_epochs": 6}
        found.append(fit(steps if options else 1, trainer=flags, **options))
        assert torch.equal(next(found[-1][0].parameters()), watch.value)
    assert_same_fit(*found, rtol=1e-9, atol=1e-11)


# -- one step at a time ---------------------------------------------------------------------------


class Doubles(PyroSVIModule):
    """Trains on twice the loss."""

    def training_step(self, batch, batch_idx):
        return 2 * super().training_step(batch, batch_idx)


class WarmsUp(PyroSVIModule):
    """Steps at a learning rate of its own."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 1e-6 * (1 + self.trainer.global_step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


@pytest.mark.parametrize("kind", [Doubles, WarmsUp])
def test_what_a_subclass_does_to_a_step_is_done(double_precision, kind):
    found = []
    for options in ({"compile": AS_TRACED}, {}):
        torch.manual_seed(0)
        optimizer = partial(SGD, lr=1e-5)
        svi = kind(CASES["AutoNormal"].make().model, optimizer=optimizer, **options)
        trainer = quiet_trainer(max_epochs=2)
        torch.manual_seed(1)
        trainer.fit(svi, datamodule=ArrayDataModule(CASES["AutoNormal"].batch(5, 44), 4))
        found.append((svi, trainer))
    assert found[0][0]._compiled.compilations == 1
    assert not takes_whole_steps(found[0][0])
    assert_same_fit(*found, rtol=1e-9, atol=1e-11)


# -- losses that are not finite --------------------------------------------------------------------


def values(bad=None):
    x = torch.linspace(-1, 1, 44)
    if bad is not None:
        x[bad] = float("nan")
    return x


def unchecked_mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0, validate_args=False), obs=x)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("steps", [1, 4])
def test_nan_in_data_is_the_error_of_eager_and_names_the_row(steps):
    messages, before = [], []

    class Keeps(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.append([p.detach().clone() for p in pl_module.parameters()])

    for options in ({"compile": AS_TRACED, "steps_per_batch": steps}, {}):
        torch.manual_seed(0)
        svi = PyroSVIModule(unchecked_mean, checks=False, **options)
        # Row 28 is the first of the eighth mini-batch, and of the second batch of four or more.
        data = ArrayDataModule(values(bad=28), batch_size=4, shuffle=False)
        trainer = quiet_trainer(max_epochs=2, callbacks=[Keeps()])
        with pytest.raises(ValueError, match="the loss is nan") as caught:
            trainer.fit(svi, datamodule=data)
        batch, message = str(caught.value).split(": the loss is")
        assert "at fault: 28 of the data set" in batch
        messages.append(message)
        assert all(torch.isfinite(p).all() for p in svi.parameters())
        if options:
            assert svi._compiled.compilations == 1
    assert messages[0] == messages[1]
    assert "row" in messages[0]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_nan_in_a_parameter_is_the_error_of_eager(steps):
    class Spoils(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                next(pl_module.parameters()).data.fill_(float("nan"))

    messages = []
    for options in ({"compile": AS_TRACED, "steps_per_batch": steps}, {}):
        torch.manual_seed(0)
        svi = PyroSVIModule(unchecked_mean, checks=False, **options)
        data = ArrayDataModule(values(), batch_size=4, shuffle=False)
        trainer = quiet_trainer(max_epochs=2, callbacks=[Spoils()])
        with pytest.raises(ValueError) as caught:
            trainer.fit(svi, datamodule=data)
        batch, message = str(caught.value).split(": the loss")  # K = 4 is told with its part
        assert batch.startswith("training batch 0 of epoch 1 ")
        messages.append(message)
    assert messages[0] == messages[1]


# -- inductor --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inductor_takes_the_same_steps(double_precision):
    found = fit(4, by_groups, compile="strict")
    assert_same_fit(found, fit(1, by_groups), rtol=1e-9, atol=1e-11)
    assert takes_whole_steps(found[0])


@pytest.mark.slow
@no_validation
@pytest.mark.parametrize("steps", [1, 4])
def test_inductor_takes_the_same_steps_of_rows(steps):
    svi, _ = fit(steps, model=rows, compile="strict")
    assert_same_parameters(svi, fit(1, model=rows)[0])
    assert takes_whole_steps(svi)


class Given(Sampler):
    """Rows as they are listed, each epoch."""

    def __init__(self, listed):
        self.listed = listed

    def __iter__(self):
        return iter(self.listed)

    def __len__(self):
        return len(self.listed)


def test_a_row_that_comes_twice_in_a_later_part_is_the_same(double_precision):
    found = []
    for compile in (AS_TRACED, False):
        torch.manual_seed(0)
        options = {"optimizer": ADAM, "compile": compile, "steps_per_batch": 2, "dataset_size": 8}
        svi = PyroSVIModule(rows, AutoNormal, **options)
        data = IndexedDataset(TensorDataset(*values_batch(5, rows=8)))
        # Parts of four: the second of each batch holds row 5 twice.
        sampler = Given([0, 1, 2, 3, 4, 5, 5, 6] * 3)
        loader = DataLoader(data, batch_size=8, sampler=sampler, collate_fn=data.collate)
        torch.manual_seed(1)
        quiet_trainer(max_epochs=3).fit(svi, loader)
        found.append(svi)
    assert takes_whole_steps(found[0])
    assert_same_parameters(*found)
