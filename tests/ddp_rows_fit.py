"""Fits a latent of each row on two processes; rank 0 writes what each rank found as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Trainer, seed_everything
from pyro.infer import Trace_ELBO

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B, EPOCHS, NOISE = 61, 16, 300, 0.5
DATA = 2 + 1.2 * torch.randn(N, generator=torch.Generator().manual_seed(3))


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def main(path: str) -> None:
    seed_everything(0)
    svi = PyroSVIModule(
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
    everyone = svi.all_gather(torch.cat(tables))
    if trainer.is_global_zero:
        found = {"world_size": trainer.world_size, "parameters": everyone.tolist()}
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
