"""Fits the mean of a Normal on two processes; rank 0 writes what each rank found as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import os
import sys
from functools import partial

import torch
from lightning.pytorch import Trainer, seed_everything
from pyro.infer import Trace_ELBO
from support import normal_mean

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B, EPOCHS = 1001, 50, 80
# One process for each of two nodes where torchrun has started it, else two of one node.
WHERE = {"num_nodes": 2, "devices": 1} if "TORCHELASTIC_RUN_ID" in os.environ else {"devices": 2}
DATA = torch.randn(N, generator=torch.Generator().manual_seed(3)) + 1.0


def main(path: str, accelerator: str = "cpu") -> None:
    where = WHERE if accelerator == "cpu" else {"devices": torch.cuda.device_count()}
    seed_everything(0)
    svi = PyroSVIModule(
        normal_mean,
        # Many particles: the noise of the sd's gradient is what keeps it from its limit.
        elbo=Trace_ELBO(num_particles=30, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.94),
    )
    trainer = Trainer(
        accelerator=accelerator,
        **where,
        strategy="ddp",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B, val=DATA[:101]))
    # Lightning has brought the module back to the CPU, where NCCL gathers nothing.
    mine = torch.stack([p.detach() for p in svi.parameters()]).to(trainer.strategy.root_device)
    everyone = trainer.strategy.all_gather(mine)
    draws = svi.posterior_samples(20_000)["mu"]
    if trainer.is_global_zero:
        found = {
            "world_size": trainer.world_size,
            "dataset_size": svi.dataset_size,
            "parameters": everyone.tolist(),
            "mean": float(draws.mean()),
            "sd": float(draws.std()),
            "steps": trainer.global_step,
            "val_loss": float(trainer.callback_metrics["val_loss"]),
        }
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
