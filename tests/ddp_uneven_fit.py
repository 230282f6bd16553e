"""Fits on two processes that have other numbers of batches; rank 0 writes what was found as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import logging
import os
import sys
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from support import normal_mean, quiet_trainer
from torch.utils.data import DataLoader, IterableDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B, LOC = 100, 4, 0.25
UNEQUAL = 16, 13  # four batches of each rank
UNEQUAL_STEPS = 8, 5  # two batches, which hold four steps of two rows, and three
RANK = int(os.environ.get("LOCAL_RANK", "0"))

trainer_of_two = partial(
    quiet_trainer, devices=2, strategy="ddp", use_distributed_sampler=False, max_epochs=1
)


def everyones(value):
    """What each rank has, by rank."""
    found = [None, None]
    torch.distributed.all_gather_object(found, value)
    return found


def rows(batches, rank=RANK):
    """Rows that tell the ranks apart."""
    return torch.linspace(rank, rank + 1, batches * B)


def linear(count, rank=RANK):
    """As many rows as said, that tell the ranks apart."""
    return torch.linspace(rank, rank + 1, count)


class Streamed(IterableDataset):
    def __init__(self, mine):
        self.mine = mine

    def __iter__(self):
        yield from self.mine


class Stream(IterableDataset):
    """Rows of this rank, of which nothing tells how many there are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from rows(self.batches)


def stream(*batches):
    return DataLoader(Stream(batches[RANK]), batch_size=B)


def part(*batches):
    return DataLoader(rows(batches[RANK]), batch_size=B)


def ragged(counts, streams=False):
    """So many rows of each rank, whose last batches are of other sizes."""
    mine = linear(counts[RANK])
    return DataLoader(Streamed(mine) if streams else mine, batch_size=B)


class Steps(Callback):
    """Keeps gradients, and the training batches before each validation, with those of it."""

    def __init__(self):
        self.trained, self.validated, self.gradients = 0, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(float(next(pl_module.parameters()).grad))

    def on_train_batch_end(self, *_):
        self.trained += 1

    def on_validation_start(self, *_):
        self.validated.append([self.trained, 0])

    def on_validation_batch_end(self, *_):
        self.validated[-1][1] += 1


def module(**options):
    """A model at one point: its loss has no noise, and its parameter stays where it is."""
    still = partial(torch.optim.SGD, lr=0.0)
    guide = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(LOC))
    svi = PyroSVIModule(normal_mean, guide, optimizer=still, **{"dataset_size": N, **options})
    svi.register_buffer("statistic", torch.zeros(()))  # DDP sends buffers in a validation, too
    return svi


def fit(*loaders, svi=None, datamodule=None, **options):
    """What happened on each rank: steps, figures, an error and warnings of ours."""
    steps = Steps()
    trainer = trainer_of_two(callbacks=[steps], num_sanity_val_steps=0, **options)
    error, figure = None, None
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            trainer.fit(svi or module(), *loaders, datamodule=datamodule)
            figure = float(trainer.callback_metrics.get("val_loss", "nan"))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    ours = [str(each.message) for each in given if "pyro_lightning" in each.filename]
    found = {
        "steps": trainer.global_step,
        "validated": steps.validated,
        "gradients": steps.gradients,
        "error": error,
        "val_loss": figure,
        "warnings": ours,
    }
    return everyones(found)


def fit_of_parts(counts, streams=False, **options):
    """A fit of all rows of parts that are not of one size."""
    return fit(ragged(counts, streams), svi=module(dataset_size=sum(counts), **options))


def rows_alone(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)


def unscaled(x):
    pyro.sample("x", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 0.1)), 1.0).expand([1]), obs=x)


def fails_on_the_second(x):
    if RANK == 1:
        raise LookupError("only here")
    normal_mean(x)


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def logged_by_pyro():
    lines, log = Lines(), logging.getLogger("pyro")
    log.addHandler(lines)
    svi = module(elbo=Trace_ELBO(num_particles=2, vectorize_particles=True))
    fit(part(2, 2), svi=svi)
    log.removeHandler(lines)
    return everyones({"lines": lines.lines, "level": log.level})


class Late(LightningDataModule):
    """A datamodule whose loader one of the ranks cannot make."""

    dataset_size = N

    def train_dataloader(self):
        if RANK == 1:
            raise OSError("no such file here")
        return part(2, 2)


class Elsewhere(PyroSVIModule):
    def configure_callbacks(self):
        return []


class Plain(LightningModule):
    """A module that is none of ours."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fits_of_one_trainer():
    trainer = trainer_of_two(max_epochs=-1, max_steps=2)
    steps = []
    for each in (module(), module(), Plain()):
        trainer.fit(each, part(4, 4))
        steps.append(trainer.global_step)
        trainer.fit_loop.epoch_loop.max_steps += 2
    return everyones({"steps": steps})


def found_of_all():
    found = {
        "streams": fit(stream(7, 4), stream(3, 5), max_epochs=2),
        "accumulated": fit(stream(5, 3), accumulate_grad_batches=2),
        "equal_streams": fit(stream(3, 3)),
        "stopped": fit(stream(9, 9), max_steps=2),
        "lengths": fit(part(10, 6), part(2, 1), val_check_interval=0.5),
        "empty": fit(stream(3, 0)),
        "limit": fit(stream(9, 4), limit_train_batches=6),
        "empty_validation": fit(part(2, 2), stream(2, 0)),
        "one_fails": fit(part(2, 2), svi=PyroSVIModule(fails_on_the_second)),
        "sizes": fit(part(2, 3), svi=module(dataset_size=None)),
        "lengths_known": fit(part(2, 2) if RANK else stream(2, 2)),
        "parts": fit(part(2, 2), svi=module(dataset_size=None)),
        "no_callbacks": fit(part(2, 2), svi=Elsewhere(normal_mean, dataset_size=N)),
        "one_trainer": fits_of_one_trainer(),
        "unequal": fit_of_parts(UNEQUAL),
        "unequal_steps": fit_of_parts(UNEQUAL_STEPS, steps_per_batch=2),
        "streamed_steps": fit_of_parts(UNEQUAL_STEPS, streams=True, steps_per_batch=2),
        "late_loader": fit(svi=module(), datamodule=Late()),
        "logged": logged_by_pyro(),
        "rows_alone": fit(svi=PyroSVIModule(rows_alone), datamodule=ArrayDataModule(rows(4))),
        "no_scale": fit(part(2, 2), svi=PyroSVIModule(normal_mean, data_plate=None)),
    }
    return found


def main(path: str) -> None:
    trainer_of_two(fast_dev_run=True).fit(module(), part(1, 1))  # starts the processes
    found = found_of_all()
    if RANK == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
