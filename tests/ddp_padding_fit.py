"""Fits at fixed parameters on several processes; rank 0 writes figures and gradients as JSON.

Run as a script, since Lightning starts the other processes from the same command.
"""

import json
import sys
from functools import partial

import torch
from compiled_support import AS_TRACED
from lightning.pytorch import LightningDataModule, Trainer
from padding_models import FEW, OTHER, TEST, TRAIN, VAL, Guide, Model, N, alone, no_guide
from torch.optim import SGD
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)
from torchmetrics import MeanAbsoluteError

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule, RowAdam


class Still(SGD):
    """Moves nothing, and keeps the sum of all gradients."""

    total = 0.0

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        dense = [g.to_dense() if g.is_sparse else g for g in grads]
        self.total = self.total + torch.cat([g.reshape(-1) for g in dense])
        return loss


class Measured(PyroSVIModule):
    """With metrics of its own: a torchmetrics metric, and a mean."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.metric = MeanAbsoluteError()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx, dataloader_idx)
        x, noise = self.without_repeats(batch, batch_idx, dataloader_idx)
        self.log_mean("val_mean", x.mean(), rows=len(x))
        if dataloader_idx == 0:
            self.metric.update(noise, x)
            self.log("val_mae", self.metric, on_step=False, on_epoch=True)


class EveryRow(Sampler):
    """A sampler of the user's own, which Lightning wraps."""

    def __len__(self):
        return N

    def __iter__(self):
        return iter(range(N - 1, -1, -1))


class OwnSampler(LightningDataModule):
    """A ``DistributedSampler`` of the user's own."""

    def train_dataloader(self):
        share = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        data = TensorDataset(*TRAIN)
        return DataLoader(data, batch_size=50, sampler=DistributedSampler(data, **share))


def loaders(dataset=None, **options):
    dataset = TensorDataset(*TRAIN) if dataset is None else dataset
    held_out = [
        DataLoader(TensorDataset(*VAL), batch_size=50),
        DataLoader(TensorDataset(*OTHER), batch_size=3),
    ]
    options = {"batch_size": 100, **options}
    return {"train_dataloaders": DataLoader(dataset, **options), "val_dataloaders": held_out}


def arrays(batch_size, data=TRAIN, **options):
    return {"datamodule": ArrayDataModule(data, batch_size=batch_size, **options)}


def amortised(**options):
    return Measured(Model(), Guide(), optimizer=partial(Still, lr=0.0), **options)


def of_rows(**options):
    options = {"optimizer": partial(Still, lr=0.0), **options}
    return PyroSVIModule(Model(), Guide(of_rows=True), **options)


def by_batches():
    sampler = BatchSampler(SequentialSampler(range(N)), 143, False)  # 7 batches of equal size
    return {"batch_size": None, "sampler": sampler}


def rows_alone():
    return PyroSVIModule(alone, no_guide, optimizer=partial(Still, lr=0.0), data_plate=None)


def numbered():
    return loaders(IndexedDataset(TensorDataset(*TRAIN)))["train_dataloaders"]


# 1001 rows in shares of 501 on two processes, and of 334 on three. Batches of 100 and of 50 leave
# one row to the last batch of 501, those of 111 to that of 334, and on the last process it is a
# repeat. Batches of 167 fill both shares. Module, data, and on how many processes they run.
CASES = {
    "arrays": (amortised, lambda: arrays(100, val=VAL, test=TEST), (1, 2, 3)),
    "full batches": (amortised, lambda: arrays(167), (1, 2)),
    "blocks": (amortised, lambda: arrays(111, shuffle="blocks"), (1, 3)),
    "a row alone in a batch of steps": (
        partial(amortised, steps_per_batch=5),
        lambda: arrays(20),
        (1, 2),
    ),
    "a row alone in a step": (
        partial(amortised, steps_per_batch=6),
        lambda: arrays(100),
        (1, 2),
    ),
    "full steps": (partial(amortised, steps_per_batch=3), lambda: arrays(167), (1, 2)),
    "steps on three": (partial(amortised, steps_per_batch=3), lambda: arrays(111), (1, 3)),
    "traced": (partial(amortised, compile=AS_TRACED), lambda: arrays(100), (1, 2)),
    "loader": (amortised, lambda: loaders(shuffle=True), (1, 2, 3)),
    "loader of a sampler": (amortised, lambda: loaders(sampler=EveryRow()), (1, 2)),
    "loader of batches": (amortised, lambda: loaders(**by_batches()), (1, 2, 3)),
    "own DistributedSampler": (amortised, lambda: {"datamodule": OwnSampler()}, (1, 2)),
    "rows": (of_rows, lambda: arrays(100), (1, 2, 3)),
    "rows in several steps": (partial(of_rows, steps_per_batch=5), lambda: arrays(20), (1, 2)),
    "accumulated": (of_rows, lambda: arrays(100), (1, 2)),
    "numbered": (of_rows, lambda: {"train_dataloaders": numbered()}, (1, 2)),
    "alone": (rows_alone, lambda: arrays(100, val=VAL), (1, 2, 3)),
    "fewer rows than processes": (amortised, lambda: arrays(5, data=FEW), (1, 3)),
}
# Rows of a step, where it is not 100.
SIZES = {
    "full batches": 167,
    "blocks": 111,
    "a row alone in a batch of steps": 20,
    "full steps": 167,
    "steps on three": 111,
    "own DistributedSampler": 50,
    "rows in several steps": 20,
}


def trainer_of(devices, **options):
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def figures(trainer):
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(name, devices):
    """What a fit of one epoch logs, and its mean gradient over steps and ranks."""
    make, data, _ = CASES[name]
    svi, feed = make(), data()
    trainer = trainer_of(devices, accumulate_grad_batches=2 if name == "accumulated" else 1)
    trainer.fit(svi, **feed)
    batches = trainer.num_training_batches
    steps = trainer.global_step if svi.steps_per_batch > 1 else batches
    total = trainer.optimizers[0].total * trainer.accumulate_grad_batches
    sizes = [p.numel() for p in svi.parameters()]
    names = [name.rpartition(".")[2] for name, _ in svi.named_parameters()]
    mean = dict(zip(names, (total / steps).split(sizes), strict=True))
    found = {
        "figures": figures(trainer),
        "steps": trainer.global_step,
        "batches": batches,
        "gradient": {name: value.tolist() for name, value in mean.items()},
    }
    if name == "arrays":
        tester = trainer_of(devices)
        tester.test(svi, verbose=False, **feed)
        found["figures"].update(figures(tester))
    return found


def rows_stepped(devices, steps):
    """How often each row's parameter was stepped in an epoch."""
    svi = of_rows(optimizer=partial(RowAdam, lr=0.1), steps_per_batch=steps)
    trainer = trainer_of(devices)
    trainer.fit(svi, **arrays(100 // steps))
    parameter = svi._row_parameters()["_pyro_param_store.row_locs"]
    return svi.all_gather(trainer.optimizers[0].state[parameter]["step"]).reshape(-1, N).tolist()


def measure(devices):
    found = {name: fit(name, devices) for name, case in CASES.items() if devices in case[2]}
    for steps in (1, 5):
        found[f"stepped, {steps}"] = rows_stepped(devices, steps)
    return found


def main(path: str, devices: str) -> None:
    found = measure(int(devices))
    if torch.distributed.get_rank() == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
