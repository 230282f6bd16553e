"""Fits a latent of each row on two processes; rank 0 writes what each rank found as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import math
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from pyro.infer import Trace_ELBO
from support import quiet_trainer
from torch.profiler import ProfilerActivity, profile

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B, EPOCHS, NOISE = 61, 16, 300, 0.5
DATA = 2 + 1.2 * torch.randn(N, generator=torch.Generator().manual_seed(3))


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class OwnHooks(PyroSVIModule):
    """Hooks of a subclass that know nothing of ours."""

    def on_fit_start(self):
        pass

    def on_before_optimizer_step(self, optimizer):
        pass


class Sent(Callback):
    """Counts the numbers that this rank hands to collectives in the third step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profile.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.profile.stop()
            sent = [e for e in self.profile.events() if e.name.startswith("gloo:")]
            self.numbers = sum(math.prod(shape) for event in sent for shape in event.input_shapes)


def numbers_sent(count):
    """What a step sends where the data set has so many rows."""
    sent = Sent()
    trainer = quiet_trainer(devices=2, strategy="ddp", max_steps=3, callbacks=[sent])
    trainer.fit(PyroSVIModule(model), datamodule=ArrayDataModule(torch.randn(count), batch_size=B))
    return sent.numbers


def main(path: str) -> None:
    seed_everything(0)
    svi = OwnHooks(
        model,
        elbo=Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        optimizer=partial(torch.optim.Adam, lr=0.1),
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.985),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        gradient_clip_val=1e6,  # clips nothing, but meets the gradients of rows
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B))
    tables = (
        svi.guide.locs.z.detach(),
        svi.guide.scales.z.detach(),
        svi.guide.locs.mu.detach()[None],
    )
    everyone = svi.all_gather(torch.cat(tables)).tolist()
    sent = {count: numbers_sent(count) for count in (200, 20_000)}
    if trainer.is_global_zero:
        found = {"world_size": trainer.world_size, "parameters": everyone, "sent": sent}
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
