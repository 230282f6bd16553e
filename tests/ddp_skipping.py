"""Skips bad batches on two processes; rank 0 writes what each rank found as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from support import normal_mean

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 24, 2
# In order rank 0 has rows 0, 2, 4, ..., and rank 1 the others: row 5 is in batch 1 of rank 1
# alone, rows 8 and 9 in batch 2 of both.
BAD = [5, 8, 9]
DATA = torch.linspace(-1.0, 2.0, N)
DATA[BAD] = float("nan")


def effects(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Steps(Callback):
    """Keeps the parameters after each batch."""

    def __init__(self):
        self.kept = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kept.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))


def fit(model, steps, optimizer, accumulate=1):
    seed_everything(0)
    svi = PyroSVIModule(model, bad_batches="skip", steps_per_batch=steps, optimizer=optimizer)
    kept = Steps()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=[kept],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = ArrayDataModule(DATA, batch_size=B, shuffle=False, val=DATA[:12])
    trainer.fit(svi, datamodule=data)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "parameters": svi.all_gather(torch.stack(kept.kept)).tolist(),
        "figures": [
            {name: float(values[rank]) for name, values in svi.all_gather(figures).items()}
            for rank in range(2)
        ],
        "dataset_size": svi.dataset_size,
    }


def main(path: str) -> None:
    # Momentum would move a parameter in a step without a gradient, too.
    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    found = {
        "one": fit(normal_mean, 1, sgd),
        "several": fit(normal_mean, 2, sgd),
        "accumulated": fit(normal_mean, 1, sgd, accumulate=2),
        "rows": fit(effects, 1, partial(torch.optim.Adam, lr=0.01)),
    }
    if torch.distributed.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
