"""Fits networks that functions use on two processes; rank 0 writes what each rank found as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import os
import sys

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Trainer
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B, EPOCHS = 40, 5, 2
X = torch.linspace(-1, 1, N)

# Other weights and other noise on each rank, which must not stay so.
torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
NET = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(NET(x[:, None])[:, 0] + z, 0.5), obs=2 * x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.1))
    pyro.sample("z", dist.Normal(loc, 0.1))


def main(path: str) -> None:
    start = [p.detach().clone() for p in NET.parameters()]
    svi = PyroSVIModule(model, guide)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=B))
    everyone = {
        name: svi.all_gather(torch.cat([p.detach().flatten() for p in parameters])).tolist()
        for name, parameters in {"start": start, "end": NET.parameters()}.items()
    }
    if trainer.is_global_zero:
        found = {"world_size": trainer.world_size, "names": sorted(svi.state_dict()), **everyone}
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
