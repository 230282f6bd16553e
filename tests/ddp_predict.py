"""Predicts on two processes; rank 0 writes what the stores of both hold as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler

from pyro_lightning import Prediction, PredictionWriter, PyroSVIModule

N, S = 23, 400
X = torch.linspace(0, 1, N)


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.deterministic("level", mu + x)
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def module(seed=None):
    svi = PyroSVIModule(model, dataset_size=N, prediction=Prediction(S, seed=seed))
    svi.loss(X)
    svi.guide.locs.mu, svi.guide.scales.mu = torch.tensor(2.0), torch.tensor(1.0)
    return svi


def predict(folder, loader, seed=None, **options):
    """Predict with a writer; returns what is stored, or the error."""
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PredictionWriter(folder)],
        **options,
    )
    # Generators that differ, as without seed_everything.
    torch.manual_seed(trainer.global_rank)
    try:
        trainer.predict(module(seed), loader, return_predictions=False)
    except FileExistsError as error:
        return trainer, str(error)
    trainer.strategy.barrier()
    stored = PredictionWriter.open(folder)
    found = {name: stored[name].values.tolist() for name in ("row", "level", "x")}
    return trainer, {**found, "stores": len(list(Path(folder).iterdir()))}


def main(path: str) -> None:
    folder, two = Path(path).parent, {"devices": 2, "strategy": "ddp"}
    loader = DataLoader(X, batch_size=4)
    trainer, of_torch = predict(folder / "torch", loader, **two)
    found = {"unseeded": of_torch, "seeded": predict(folder / "seed", loader, 3, **two)[1]}
    sampler = DistributedSampler(X, num_replicas=2, rank=trainer.global_rank, shuffle=False)
    own = DataLoader(X, batch_size=4, sampler=sampler)  # its last row is a repeat on rank 1
    found["own_sampler"] = predict(folder / "own", own, 3, **two)[1]
    errors = [None, None]
    error = predict(folder / "own", loader, **two)[1]
    torch.distributed.all_gather_object(errors, error)
    if trainer.is_global_zero:
        with open(path, "w") as file:
            json.dump({**found, "errors": errors}, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
