"""Validates and tests on several processes; rank 0 writes the figures as JSON.

Run as a script, since Lightning starts the other processes from the same command.
"""

import json
import sys

import torch
from lightning.pytorch import Trainer
from metric_models import all_metrics, data, fixed_noise
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule


def measure(devices):
    rows = TensorDataset(*data())
    torch.manual_seed(0)
    svi = PyroSVIModule(
        fixed_noise,
        dataset_size=len(rows),
        metrics=all_metrics(),
        prediction={"num_samples": 100},
    ).double()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    found = {}
    one = TensorDataset(*(each[:1] for each in data()))  # which leaves a process without a row
    loaders = [
        DataLoader(rows, batch_size=4),
        DataLoader(rows, batch_size=len(rows)),
        DataLoader(one),
    ]
    for run in (trainer.validate, trainer.test):
        torch.manual_seed(0)
        run(svi, loaders, verbose=False)
        found.update({name: float(value) for name, value in trainer.callback_metrics.items()})
    return found


def main(path):
    found = measure(2)
    if torch.distributed.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
