"""Streams shards from the current folder to two processes; writes what each was fed as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from stream_support import N, RowsSeen, SavedAt, lit_loader, mean_of, web_loader

from pyro_lightning import PyroSVIModule


class Streams(LightningDataModule):
    """Makes its loader where the processes are there, which libraries look for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make(Path.cwd())


def fit(svi, make, epochs, ckpt=None):
    """Fit; returns the Trainer, and the rows of each rank in the last epoch."""
    seen = RowsSeen()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen, SavedAt(7, "step-7.ckpt")],
    )
    trainer.fit(svi, datamodule=Streams(make), ckpt_path=ckpt)
    return trainer, svi.all_gather(torch.tensor(sum(seen.epochs[epochs - 1], []))).tolist()


def main(path: str) -> None:
    seed_everything(0)
    found = {"rows": {}, "sizes": {}}
    # Those with workers first: a process with threads, as litdata's reader starts, is forked badly.
    loaders = {
        "litdata, workers": partial(lit_loader, workers=2, shuffle=True),
        "WebDataset, workers": partial(web_loader, workers=2, shuffle=True),
        "litdata": lit_loader,
        "litdata, ragged": partial(lit_loader, rows=slice(103), batch_size=8, shuffle=True),
        "WebDataset": web_loader,
    }
    for name, make in loaders.items():
        svi = PyroSVIModule(mean_of, dataset_size=None if name.startswith("lit") else N)
        _, found["rows"][name] = fit(svi, make, epochs=1)
        found["sizes"][name] = svi.all_gather(torch.tensor(svi.dataset_size)).tolist()
    make = partial(lit_loader, shuffle=True)
    _, found["rows"]["first"] = fit(PyroSVIModule(mean_of), make, epochs=1)
    _, found["rows"]["rest"] = fit(PyroSVIModule(mean_of), make, epochs=1, ckpt="step-7.ckpt")
    svi = PyroSVIModule(
        mean_of,
        partial(AutoNormal, init_scale=0.05),
        # Many particles: the noise of the sd's gradient is what keeps it from its limit.
        elbo=Trace_ELBO(num_particles=30, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.89),
    )
    trainer, _ = fit(svi, make, epochs=40)
    draws = svi.posterior_samples(20_000)["mu"]
    found["mean"], found["sd"] = float(draws.mean()), float(draws.std())
    if trainer.is_global_zero:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
