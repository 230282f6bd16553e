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
from lightning.pytorch import Trainer
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
    if trainer.is_global_zero:
        both = [torch.cat([rows[0, step], rows[1, step]]) for step in range(STEPS)]
        with open(folder / "lightning_logs/version_0/metrics.csv") as file:
            table = [row for row in csv.DictReader(file) if row["posterior/mu_mean"]]
        found = {
            "followed": {row["step"]: float(row["posterior/mu_mean"]) for row in table},
            "points": [float(after[0]) for after in seen.after],
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
