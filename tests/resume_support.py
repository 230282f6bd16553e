"""Fits that are saved at every hook, and go on from there."""

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 22, 4  # batches of 4 and a last one of 2
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


def arrays(count=N):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0]) + torch.randn(count, generator=generator)


def model(x, y):
    """A global and a latent of each row."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ w + z, 0.5), obs=y)


def global_model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


class Events(Callback):
    """Lists what happens in a fit: steps and their losses, validations, ends of epochs."""

    def __init__(self):
        self.seen = []

    def _add(self, trainer, kind, *values):
        figures = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name in ("train_loss", "val_loss")
        }
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        at = trainer.current_epoch, trainer.global_step
        self.seen.append((kind, *at, *values, figures, rates))

    def on_train_epoch_start(self, trainer, pl_module):
        self._add(trainer, "epoch")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._add(trainer, "step", batch_idx, float(loss))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self._add(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._add(trainer, "epoch end")


class Saver(Checkpoint):
    """Saves in a hook, each time; the last of all callbacks, as every ``Checkpoint``."""

    def __init__(self, folder, events, hooks):
        self.folder, self.events = folder, events
        self.saved = []  # path, and how many events there had been
        for hook in hooks:
            setattr(self, hook, functools.partial(self._save, hook))

    def _save(self, hook, trainer, *_, **__):
        if trainer.sanity_checking:
            return
        path = self.folder / f"{len(self.saved)}-{hook}.ckpt"
        trainer.save_checkpoint(path)
        # The hooks of an epoch's start are run again, those of other callbacks among them.
        self.saved.append((path, len(self.events.seen) - (hook == "on_train_epoch_start")))


class Fit:
    """A fit: what happened in it, and what it left."""

    def __init__(self, make, data, callbacks=(), ckpt_path=None, seed=0, saver=None, **flags):
        for seeded in (torch.manual_seed, random.seed, np.random.seed):
            seeded(seed)
        self.events = Events()
        callbacks = [self.events, *(each() for each in callbacks)]
        if saver:
            self.saver = saver(self.events)
            callbacks.append(self.saver)
        self.svi = make()
        flags = {"max_epochs": 3, "enable_checkpointing": bool(saver), **flags}
        self.trainer = quiet_trainer(callbacks=callbacks, **flags)
        given = data()
        given = given if isinstance(given, dict) else {"datamodule": given}
        self.trainer.fit(self.svi, **given, ckpt_path=ckpt_path)
        self.state = dict(self.svi.named_parameters()) | dict(self.svi.named_buffers())
        self.optimizer = self.trainer.optimizers[0].state_dict()


def assert_equal(one, other):
    """Compare nested states bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_goes_on(tmp_path, make, data, hooks=("on_train_batch_end",), at=None, **options):
    """Save a fit in hooks, go on from each place, and compare all that follows bit for bit."""
    whole = Fit(make, data, saver=lambda events: Saver(tmp_path, events, hooks), **options)
    saved = whole.saver.saved if at is None else [whole.saver.saved[i] for i in at]
    assert saved
    for path, count in saved:
        again = Fit(make, data, ckpt_path=path, seed=99, **options)
        left = whole.events.seen[count:]
        assert again.events.seen == left, f"{path.name}: {again.events.seen[:1]} not {left[:1]}"
        assert_equal(again.state, whole.state)
        if left:  # what is due after the last epoch waits for the fit that goes on
            assert_equal(again.optimizer, whole.optimizer)
        counts = [
            (each.trainer.current_epoch, each.trainer.fit_loop.epoch_loop._batches_that_stepped)
            for each in (again, whole)
        ]
        assert counts[0] == counts[1], path.name  # the second is the x-axis of loggers
    return whole


def make(model=model, **options):
    return functools.partial(PyroSVIModule, model, **{"optimizer": ADAM, **options})


def rows(**options):
    """A maker of an ``ArrayDataModule``; ``val`` is a number of rows."""
    if "val" in options:
        options["val"] = arrays(options["val"])
    return lambda: ArrayDataModule(arrays(), **{"batch_size": B, **options})
