"""Anneals the KL on two processes, stops them by their iterates, and follows the posterior.

Rank 0 writes what each found as JSON. Run as a script, since Lightning starts the second process
from the same command.
"""

import csv
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from annealing_support import Seen, linear
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from pyro.infer.autoguide import AutoDelta
from support import normal_mean

from pyro_lightning import (
    ArrayDataModule,
    ELBOConvergence,
    KLAnnealing,
    PosteriorMonitor,
    PyroSVIModule,
)

N, B, STEPS = 24, 3, 12
DATA = torch.linspace(-1.0, 2.0, N)


def expected(mu: float, weight: float, rows: torch.Tensor) -> float:
    """The negative ELBO of all rows by a point: its prior is the whole of the KL."""
    constant = 0.5 * torch.tensor(2 * torch.pi).log()
    prior = 0.5 * (mu / 0.1) ** 2 + constant - torch.tensor(10.0).log()
    likelihood = (0.5 * (rows - mu) ** 2 + constant).mean() * N
    return float(likelihood + weight * prior)


class Watched(Callback):
    """Keeps what schedulers and callbacks read after a batch, and at which rate it goes on."""

    def __init__(self):
        self.points, self.batches, self.figures, self.rates = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.points.append([float(p) for p in pl_module.parameters()])
        self.batches.append(batch)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        names = "train_loss_per_obs_step", "train_loss_per_obs"
        self.figures.append([float(trainer.callback_metrics.get(name, "nan")) for name in names])


def of_steps(steps: int = 1) -> dict:
    """A fit whose scheduler watches the figure of a step."""

    def plateau(optimizer):
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.9)
        watched = {"monitor": "train_loss_per_obs_step", "interval": "step", "strict": False}
        return {"scheduler": schedule, **watched}

    scheduler = plateau if steps == 1 else None
    sgd = partial(torch.optim.SGD, lr=1e-3)
    svi = PyroSVIModule(
        normal_mean, AutoDelta, optimizer=sgd, lr_scheduler=scheduler, steps_per_batch=steps
    )
    watched = Watched()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=3,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watched],
    )
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B))
    everyones = svi.all_gather(torch.stack(watched.batches))
    found = {
        name: svi.all_gather(torch.tensor(getattr(watched, name))).tolist()
        for name in ("points", "figures", "rates")
    }
    found["expected"] = [
        expected(point[0], 1.0, torch.cat([everyones[0, step], everyones[1, step]])) / N
        for step, point in enumerate(watched.points)
    ]
    return found


def main(path: str) -> None:
    warnings.filterwarnings("error", ".*sync_dist")  # of a figure that ranks did not share
    svi = PyroSVIModule(normal_mean, AutoDelta, optimizer=partial(torch.optim.SGD, lr=1e-3))
    seen, stop = Seen(), ELBOConvergence(window=20, r_hat=3.0, ess=1.0)
    follow = PosteriorMonitor(["mu"], every_n_steps=10, num_samples=2, figure_every=0)
    folder = Path(path).parent
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=1000,
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[KLAnnealing(steps=7), stop, follow, seen],
    )
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B))
    losses = svi.all_gather(torch.stack(seen.losses[:STEPS]))
    weights = svi.all_gather(torch.tensor(seen.weights[:STEPS], dtype=torch.float64))
    rows = svi.all_gather(torch.stack(seen.batches[:STEPS]))
    ends = svi.all_gather(torch.tensor([stop.stationary_at, trainer.global_step, stop.averaged]))
    means = svi.all_gather(torch.stack([p.detach() for p in svi.parameters()]))
    of_a_step, of_two = of_steps(), of_steps(2)
    if trainer.is_global_zero:
        both = [torch.cat([rows[0, step], rows[1, step]]) for step in range(STEPS)]
        with open(folder / "lightning_logs/version_0/metrics.csv") as file:
            table = [row for row in csv.DictReader(file) if row["posterior/mu_mean"]]
        found = {
            "followed": {row["step"]: float(row["posterior/mu_mean"]) for row in table},
            "points": [float(after[0]) for after in seen.after],
            "of a step": of_a_step,
            "of two": of_two,
            "weights": weights.tolist(),
            "converged": stop.converged,
            "ends": ends.tolist(),
            "means": means.tolist(),
            "losses": losses.tolist(),
            "expected": [
                expected(float(before[0]), linear(step, 7), batch)
                for step, (before, batch) in enumerate(zip(seen.before, both, strict=False))
            ],
        }
        with open(path, "w") as file:
            json.dump(found, file)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
