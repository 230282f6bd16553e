"""pyro_lightning: ``PyroSVIModule`` and ``ArrayDataModule`` under ``Trainer.fit``."""

from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import autoguide
from pyro.nn import PyroModule

from benchmarks.speed.clock import Clock
from benchmarks.speed.job import Job
from benchmarks.speed.methods.pyro_parts import adam_options
from benchmarks.speed.methods.trainer import Timed, fit, scheduler_of
from pyro_lightning import ArrayDataModule, PyroSVIModule


class Model(PyroModule):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, *batch):
        latents = self.parts.prior()
        with pyro.plate("data", len(batch[0])):
            self.parts.likelihood(latents, *batch)


class Guide(PyroModule):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, *batch):
        with pyro.plate("data", len(batch[0])):
            self.parts.variational(*batch)


class TimedSVI(Timed, PyroSVIModule):
    pass


def run(job: Job, clock: Clock, **options: Any) -> None:
    parts = job.workload.pyro(job.constants)
    if job.workload.guide is None:
        guide: Any = Guide(parts)
    else:
        guide = getattr(autoguide, job.workload.guide)
        if job.workload.init_to_mean:
            guide = partial(guide, init_loc_fn=autoguide.init_to_mean)
    optimizer = partial(torch.optim.Adam, **adam_options(job))
    svi = TimedSVI(Model(parts), guide, None, optimizer, scheduler_of(job), **options)
    clock.medians = lambda: svi.guide.median()
    # On a GPU the arrays live there, as those of SVI.step do.
    home = None if job.device == "cpu" else "auto"
    # The smaller last batch is left out, as by NumPyro here: it would be compiled by itself.
    data = ArrayDataModule(job.arrays, job.batch_size, device=home, drop_last=True)
    fit(job, clock, svi, datamodule=data)
