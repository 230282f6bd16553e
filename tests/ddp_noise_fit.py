"""Notes what each of two processes draws in and around fits; rank 0 writes it as JSON.

Run as a script, since Lightning starts the second process from the same command.
"""

import json
import os
import random
import sys
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, seed_everything
from pyro.infer.autoguide import AutoNormal, init_to_sample
from support import normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Sampler

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, STEPS = 20, 1000
DATA = torch.randn(N, generator=torch.Generator().manual_seed(3)) + 1.0
RANK = int(os.environ.get("LOCAL_RANK", "0"))

trainer_of_two = partial(quiet_trainer, devices=2, max_epochs=1)
unshared = partial(trainer_of_two, strategy="ddp", use_distributed_sampler=False)


def everyones(values):
    """What each rank has, by rank."""
    mine = torch.as_tensor(values)
    found = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(found, mine)
    return [each.tolist() for each in found]


class Notes(Callback):
    """Keeps the averaged gradient of the guide's mean, and this rank's own loss, of each step."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(float(pl_module.guide.locs.mu.grad))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


class Validated(PyroSVIModule):
    def validation_step(self, batch, batch_idx):
        self.seen = float(self.loss(batch))
        super().validation_step(batch, batch_idx)


def whole_batches(steps):
    """Every step sees all rows, so that only the guide draws."""
    return DataLoader(DATA.repeat(steps), batch_size=N)


def fit_of_one_point(seed, steps):
    """A fit whose parameters stay where they are."""
    seed_everything(seed)
    still = partial(torch.optim.SGD, lr=0.0)
    svi, notes = Validated(normal_mean, optimizer=still, dataset_size=N), Notes()
    trainer = unshared(callbacks=[notes])
    trainer.fit(svi, whole_batches(steps), whole_batches(1))
    return svi, notes, trainer


class Initial(Callback):
    """Keeps the parameters of each rank before they are synchronised, and at the first step."""

    def on_fit_start(self, trainer, pl_module):
        # Of the callbacks the user's come first; DDP has synchronised the others by now.
        self.rows_before = everyones(pl_module.guide.locs.z.detach())

    def on_train_start(self, trainer, pl_module):
        everything = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        self.at_start = everyones(everything)


def random_effects(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def initial_values():
    torch.manual_seed(RANK)  # no seed_everything: other initial values on each rank
    initial = Initial()
    svi = PyroSVIModule(random_effects, partial(AutoNormal, init_loc_fn=init_to_sample))
    trainer = trainer_of_two(strategy="ddp", callbacks=[initial])
    trainer.fit(svi, datamodule=ArrayDataModule(DATA, batch_size=5))
    return {"rows_before": initial.rows_before, "at_start": initial.at_start}


class OwnShare(Sampler):
    """Draws one order on all ranks, by the generator that all have, and takes every other row."""

    num_replicas = 2

    def __init__(self):
        self.epochs = []

    def __len__(self):
        return N // 2

    def __iter__(self):
        self.epochs.append(torch.randperm(N).tolist()[RANK::2])
        yield from self.epochs[-1]


def rows_of_own_sampler():
    sampler = OwnShare()
    trainer = unshared(max_epochs=3)
    loader = DataLoader(DATA, sampler=sampler, batch_size=5)
    trainer.fit(PyroSVIModule(normal_mean, dataset_size=N), loader)
    return everyones(sampler.epochs[-3:])


class Drawn:
    """A guide that draws from Python and NumPy, and keeps what it drew."""

    def __init__(self):
        self.draws = []

    def __call__(self, x):
        self.draws.append([random.random(), np.random.rand()])
        pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.1))


def draws_in_python():
    seed_everything(0)
    guide = Drawn()
    unshared().fit(PyroSVIModule(normal_mean, guide, dataset_size=N), whole_batches(3))
    after = [random.random(), float(np.random.rand())]
    return {"steps": everyones(guide.draws[-3:]), "after": everyones(after)}


class TwoHeads(PyroSVIModule):
    """A model of which each batch uses one of two parameters."""

    def __init__(self):
        super().__init__(optimizer=partial(torch.optim.Adam, lr=0.05))
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in range(2)])

    def model(self, x, head):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu + self.heads[int(head[0])], 1.0), obs=x)


def unused_parameters():
    svi = TwoHeads()
    # Lightning's sampler gives each rank every other row: rank 0 head 0 alone, rank 1 head 1.
    data = ArrayDataModule((DATA, torch.arange(N) % 2), batch_size=5, shuffle=False)
    trainer = trainer_of_two(strategy="ddp_find_unused_parameters_true", max_epochs=3)
    trainer.fit(svi, datamodule=data)
    return everyones([float(head) for head in svi.heads])


def main(path: str) -> None:
    found = {"initial": initial_values()}
    svi, notes, trainer = fit_of_one_point(0, STEPS)
    found["gradients"] = everyones(notes.gradients)
    found["losses"] = everyones(notes.losses)
    found["validation"] = everyones(svi.seen)
    found["val_loss"] = everyones(trainer.callback_metrics["val_loss"])
    found["generators"] = everyones(torch.get_rng_state())
    found["samples"] = everyones(svi.posterior_samples(5)["mu"])
    with torch.no_grad():
        found["loss"] = everyones(svi.loss(DATA))
    found["again"] = fit_of_one_point(0, 5)[1].gradients
    found["other_seed"] = fit_of_one_point(1, 5)[1].gradients
    trainer = unshared()
    trainer.validate(svi, whole_batches(1), verbose=False)
    found["validate"] = everyones(svi.seen)
    found["own_sampler"] = rows_of_own_sampler()
    found["in_python"] = draws_in_python()
    found["unused"] = unused_parameters()
    if RANK == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    # Left to the interpreter's exit, its threads now and then end the process by an abort.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
