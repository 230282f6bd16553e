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
    svi = PyroSVIModule(fixed_noise, dataset_size=len(rows), metrics=all_metrics()).double()
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
    loaders = [DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=len(rows))]
    for run in (trainer.validate, trainer.test):
        torch.manual_seed(0)
        run(svi, loaders, verbose=False)
        found.update({name: float(value) for name, value in trainer.callback_metrics.items()})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = measure(2)
    if int(__import__("os").environ.get("LOCAL_RANK", 0)) == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(measured, file)
