"""Fits compiled and eager on two processes; rank 0 writes what each rank found as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import sys

import torch
from compiled_models import N, regression, regression_batch
from compiled_support import AS_TRACED
from lightning.pytorch import Trainer
from steps_support import ADAM

from pyro_lightning import ArrayDataModule, PyroSVIModule

FITS = {
    "eager": {},
    "compiled": {"compile": AS_TRACED},
    "several steps": {"compile": AS_TRACED, "steps_per_batch": 2},
}


def main(path: str) -> None:
    torch.set_default_dtype(torch.float64)
    found = {}
    for name, options in FITS.items():
        torch.manual_seed(0)
        svi = PyroSVIModule(regression, optimizer=ADAM, **options)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = ArrayDataModule(regression_batch(0, rows=N), batch_size=5)
        torch.manual_seed(1)
        trainer.fit(svi, datamodule=data)
        mine = torch.cat([p.detach().reshape(-1) for p in svi.parameters()])
        found[name] = {
            "parameters": svi.all_gather(mine).tolist(),
            "steps": trainer.global_step,
            "compiled": svi._compiled.compilations if svi._compiled else 0,
        }
    if trainer.is_global_zero:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
