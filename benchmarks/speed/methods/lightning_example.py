"""What Pyro's own Lightning example does, in other words: ``ELBOModule`` in a LightningModule.

As there the plate is told N and B, the loader is a ``DataLoader`` over a ``TensorDataset`` that
collates row by row, in order, and the first batch goes through the loss before training.
"""

import pyro
import torch
from lightning.pytorch import LightningModule
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed.clock import Clock
from benchmarks.speed.job import Job
from benchmarks.speed.methods.pyro_parts import adam_options, autoguide_of
from benchmarks.speed.methods.trainer import Timed, fit, scheduler_of


class FedPlate(PyroModule):
    """A function of a workload in a plate of N that is told B.

    Where rows have latents, the batch carries its row numbers and the plate is told them: else the
    guide would give each row the parameters of another.
    """

    def __init__(self, job, parts):
        super().__init__()
        self.parts, self.rows, self.local = parts, job.rows, job.workload.local

    def plate(self, *batch):
        if self.local:
            return pyro.plate("data", self.rows, subsample=batch[-1])
        return pyro.plate("data", self.rows, len(batch[0]))

    def columns(self, *batch):
        return batch[:-1] if self.local else batch


class Model(FedPlate):
    def forward(self, *batch):
        latents = self.parts.prior()
        with self.plate(*batch):
            self.parts.likelihood(latents, *self.columns(*batch))


class Guide(FedPlate):
    def forward(self, *batch):
        with self.plate(*batch):
            self.parts.variational(*self.columns(*batch))


class ELBOTraining(Timed, LightningModule):
    def __init__(self, loss_fn, options, scheduler):
        super().__init__()
        self.loss_fn, self.options, self.scheduler = loss_fn, options, scheduler

    def training_step(self, batch, batch_idx):
        loss = self.loss_fn(*batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.loss_fn.parameters(), **self.options)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


def run(job: Job, clock: Clock) -> None:
    pyro.settings.set(module_local_params=True)
    parts = job.workload.pyro(job.constants)
    model = Model(job, parts)
    if job.workload.guide:
        plates = {"create_plates": model.plate} if job.workload.local else {}
        guide = autoguide_of(job, model, **plates)
    else:
        guide = Guide(job, parts)
    loss_fn = Trace_ELBO()(model, guide)
    columns = [torch.from_numpy(array) for array in job.arrays]
    if job.workload.local:
        columns.append(torch.arange(job.rows))
    dataset = TensorDataset(*columns)
    loss_fn(*dataset[: job.batch_size])
    loader = DataLoader(dataset, batch_size=job.batch_size)
    clock.medians = getattr(guide, "median", dict)
    module = ELBOTraining(loss_fn, adam_options(job), scheduler_of(job))
    fit(job, clock, module, train_dataloaders=loader)
