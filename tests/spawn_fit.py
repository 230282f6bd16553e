"""Fits on two processes that are started from this one, before and after a first loss.

Run as a script, which the started processes import; writes what was found as JSON.
"""

import json
import os
import sys
from functools import partial

import torch
from support import normal_mean, quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 400, 50
DATA = torch.randn(N, generator=torch.Generator().manual_seed(3)) + 1.0


def module() -> PyroSVIModule:
    return PyroSVIModule(normal_mean, optimizer=partial(torch.optim.Adam, lr=0.05), dataset_size=N)


def fit(svi: PyroSVIModule, strategy: str) -> None:
    os.environ.pop("MASTER_PORT", None)  # that of the fit before may not be free yet
    trainer = quiet_trainer(devices=2, strategy=strategy, max_epochs=25)
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B))


def main(path: str) -> None:
    torch.manual_seed(0)
    found = {"refused": "", "mean": {}}
    try:
        fit(module(), "ddp_fork")
    except Exception as error:
        found["refused"] = str(error)
    for strategy in ("ddp_fork", "ddp_spawn"):
        svi = module()
        svi.loss(DATA[:B])
        fit(svi, strategy)
        found["mean"][strategy] = float(svi.posterior_samples(2000)["mu"].mean())
    with open(path, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1])
