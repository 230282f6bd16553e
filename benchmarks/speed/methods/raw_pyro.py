"""Plain Pyro: ``SVI.step``, all data resident, the plate in the model draws its rows."""

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule

from benchmarks.speed.clock import Clock
from benchmarks.speed.job import Job
from benchmarks.speed.methods.pyro_parts import adam_options, autoguide_of, tensors


class InModelPlate(PyroModule):
    """A function of a workload in a plate that draws B of N rows."""

    def __init__(self, job, parts, data):
        super().__init__()
        self.parts, self.data, self.batch_size = parts, data, job.batch_size

    def plate(self):
        return pyro.plate("data", len(self.data[0]), subsample_size=self.batch_size)


class Model(InModelPlate):
    def forward(self):
        latents = self.parts.prior()
        with self.plate() as rows:
            self.parts.likelihood(latents, *(column[rows] for column in self.data))


class Guide(InModelPlate):
    def forward(self):
        with self.plate() as rows:
            self.parts.variational(*(column[rows] for column in self.data))


def run(job: Job, clock: Clock) -> None:
    data, parts = tensors(job), job.workload.pyro(job.constants).to(job.device)
    model = Model(job, parts, data)
    guide = autoguide_of(job, model) if job.workload.guide else Guide(job, parts, data)
    # The global store and one optimizer a parameter: what Pyro's tutorials show.
    optimizer = pyro.optim.Adam(adam_options(job))
    if job.decay != 1:
        options = {"optimizer": torch.optim.Adam, "optim_args": adam_options(job)}
        optimizer = pyro.optim.ExponentialLR({**options, "gamma": job.decay})
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    clock.medians = getattr(guide, "median", dict)
    if job.device != "cpu":
        clock.sync = torch.cuda.synchronize
    steps = 0
    while True:
        svi.step()
        if job.decay != 1:
            optimizer.step()
        steps += 1
        clock.tick(steps)
