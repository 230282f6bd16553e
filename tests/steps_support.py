"""What tests of several steps in one training step share: fits, and what they leave behind."""

from functools import partial

import torch
from compiled_models import regression, regression_batch, rows, values_batch
from lightning.pytorch import Callback
from pyro.infer.autoguide import AutoNormal
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule

ROWS, B, EPOCHS = 44, 4, 3  # 11 steps an epoch
ADAM = partial(torch.optim.Adam, lr=0.05)


def make(steps, optimizer=ADAM, model=regression, **options):
    torch.manual_seed(0)
    return PyroSVIModule(model, AutoNormal, optimizer=optimizer, steps_per_batch=steps, **options)


def fit(steps, optimizer=ADAM, count=ROWS, data=None, trainer=None, ckpt=None, **options):
    """Fit with a number of steps to a batch of the loader; returns module and Trainer."""
    model = options.get("model", regression)
    svi = make(steps, optimizer, **options)
    arrays = (values_batch if model is rows else regression_batch)(3, rows=count)
    given = {"batch_size": B, "val": regression_batch(4, rows=8), **(data or {})}
    if model is rows:
        given["val"] = None
    runner = quiet_trainer(**{"max_epochs": EPOCHS, "log_every_n_steps": 2, **(trainer or {})})
    torch.manual_seed(1)
    runner.fit(svi, datamodule=ArrayDataModule(arrays, **given), ckpt_path=ckpt)
    return svi, runner


def resumed(steps, path, state, epochs, **options):
    """Go on with a fit from a checkpoint and the state that torch's random numbers had there."""

    class Noise(Callback):
        def on_train_start(self, trainer, pl_module):
            torch.set_rng_state(state)

    flags = {"max_epochs": epochs, "callbacks": [Noise()], "num_sanity_val_steps": 0}
    return fit(steps, trainer=flags, ckpt=path, **options)


def state_of(optimizer):
    """An optimizer's state as a list of tensors."""
    state = optimizer.state_dict()["state"]
    return [torch.as_tensor(v) for _, each in sorted(state.items()) for v in each.values()]


def assert_same_fit(found, expected, **tolerance):
    """Compare parameters, buffers, optimizer state, learning rates and counts of two fits."""
    (svi, trainer), (other, reference) = found, expected
    assert trainer.global_step == reference.global_step
    pairs = [(svi.state_dict(), other.state_dict())]
    for own, its in zip(trainer.optimizers, reference.optimizers, strict=True):
        pairs.append((state_of(own), state_of(its)))
        pairs.append(([g["lr"] for g in own.param_groups], [g["lr"] for g in its.param_groups]))
    for one, two in pairs:
        torch.testing.assert_close(one, two, **tolerance)
