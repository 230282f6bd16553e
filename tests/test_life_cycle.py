"""Set-up: lazy parameters exist in time, and nothing else has changed when training starts."""

import multiprocessing
import os
import random
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from support import normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule

N, B = 400, 100
DATA = torch.randn(N, generator=torch.Generator().manual_seed(1)) + 1.0
# The learning rate ends at 1e-3 after 45 epochs: the last steps move by far less than an sd.
FIT = {
    "optimizer": partial(torch.optim.Adam, lr=0.1),
    "lr_scheduler": partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
}
# Exact for any number of rows: precision 100 of the prior and 1 of each row.
MEAN, SD = float(DATA.sum() / (100 + N)), (100 + N) ** -0.5


class AtStart(Callback):
    """Calls a function once set-up is over and before anything trains."""

    def __init__(self, look):
        self.look = look

    def on_fit_start(self, trainer, pl_module):
        self.seen = self.look()


def rows(data=DATA, **options):
    return DataLoader(TensorDataset(data), batch_size=B, **options)


def delta_fit(svi, data, epochs=45):
    """Fit a point estimate; its limit is the posterior mean, without noise."""
    quiet_trainer(max_epochs=epochs).fit(svi, rows(data))
    return float(svi.posterior_samples(1)["mu"])


def point_module(**options):
    return PyroSVIModule(normal_mean, guide=AutoDelta, **FIT, **options)


class ShiftedPair(nn.Module):
    """A latent mean of one column beside a parameter that is the mean of the other."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
            pyro.sample("y", dist.Normal(self.loc, 1.0), obs=x + 0.5)


def test_a_lazy_guide_trains_although_the_model_has_parameters():
    torch.manual_seed(0)
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True)
    svi = PyroSVIModule(ShiftedPair(), elbo=elbo, **FIT)
    quiet_trainer(max_epochs=45).fit(svi, datamodule=ArrayDataModule(DATA, batch_size=B))
    # Over seeds the noise of the steps leaves 0.1 sd; a guide that stays put is 18 sds away.
    assert float(svi.guide.median()["mu"].detach()) == pytest.approx(MEAN, abs=0.2 * SD)
    assert float(svi.model.loc.detach()) == pytest.approx(float(DATA.mean()) + 0.5, abs=0.1 * SD)


def test_the_optimizer_holds_every_parameter_of_model_and_guide_once():
    svi = PyroSVIModule(ShiftedPair())
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1)
    trainer.fit(svi, rows())
    held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    wanted = [svi.model.loc, svi.guide.locs.mu, svi.guide.scales.mu_unconstrained]
    assert sorted(map(id, held)) == sorted(map(id, wanted))


def slope(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=x)


@pytest.mark.parametrize("made", ["before", "within"])
def test_a_first_loss_in_inference_mode_leaves_parameters_that_train(made):
    svi, batch = PyroSVIModule(slope, dataset_size=N), DATA[:B]
    with torch.inference_mode():
        svi.loss(batch if made == "before" else batch.clone())
    loss = svi.loss(DATA[:B])
    assert all(gradient != 0 for gradient in torch.autograd.grad(loss, list(svi.parameters())))


class Sized(LightningDataModule):
    """A datamodule that states N and is otherwise nothing but its loaders."""

    dataset_size = N

    def train_dataloader(self):
        return rows()

    def val_dataloader(self):
        return rows()


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_first_call_in_inference_mode_leaves_a_module_that_trains(stage):
    svi = point_module(dataset_size=N)
    getattr(quiet_trainer(), stage)(svi, rows(), verbose=False)
    assert list(svi.parameters())
    assert not any(p.is_inference() for p in svi.parameters())
    assert delta_fit(svi, DATA) == pytest.approx(MEAN, abs=0.1 * SD)


def test_validate_before_fit_takes_n_from_the_datamodule():
    svi, data = point_module(), Sized()
    trainer = quiet_trainer(max_epochs=45)
    trainer.validate(svi, datamodule=data, verbose=False)
    assert svi.dataset_size == N
    trainer.fit(svi, datamodule=data)
    assert float(svi.posterior_samples(1)["mu"]) == pytest.approx(MEAN, abs=0.1 * SD)


def test_validate_before_fit_without_n_is_refused():
    with pytest.raises(ValueError, match="never taken from validation or test data"):
        quiet_trainer().validate(PyroSVIModule(normal_mean), rows(), verbose=False)


def test_a_loader_passed_directly_gives_n_and_the_posterior():
    svi = point_module()
    assert delta_fit(svi, DATA) == pytest.approx(MEAN, abs=0.1 * SD)
    assert svi.dataset_size == N


def test_a_second_fit_reads_n_again_and_goes_on_with_the_same_parameters():
    svi = point_module()
    delta_fit(svi, DATA, epochs=1)
    before = {name: (p, p.detach().clone()) for name, p in svi.named_parameters()}
    other = DATA[:200] - 1.0
    resumed = AtStart(lambda: {name: p.detach().clone() for name, p in svi.named_parameters()})
    quiet_trainer(max_epochs=45, callbacks=resumed).fit(svi, rows(other))
    assert svi.dataset_size == 200
    assert all(p is before[name][0] for name, p in svi.named_parameters())
    assert all(torch.equal(value, before[name][1]) for name, value in resumed.seen.items())
    exact = float(other.sum() / (100 + len(other)))
    assert float(svi.posterior_samples(1)["mu"]) == pytest.approx(exact, abs=0.1 * 300**-0.5)


def test_a_second_fit_keeps_a_stated_n():
    svi = point_module(dataset_size=800)
    delta_fit(svi, DATA, epochs=1)
    # 200 rows stand for 800: the posterior is that of each row counted four times. With N = 200 the
    # mean would be 0.22 lower.
    other = DATA[:200]
    exact = float(other.mean() * 800 / (100 + 800))
    assert delta_fit(svi, other) == pytest.approx(exact, abs=0.02)
    assert svi.dataset_size == 800


def random_states():
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (name, keys.tolist(), rest), random.getstate()


class NoisyRows(Dataset):
    """Rows that use every random generator, as augmentation does."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return DATA[index] + torch.randn(()) + random.random() + np.random.rand()


def test_set_up_leaves_the_random_states_of_torch_numpy_and_python():
    start = AtStart(random_states)
    before = random_states()
    loader = DataLoader(NoisyRows(), batch_size=B, shuffle=True)
    quiet_trainer(max_epochs=1, callbacks=start).fit(PyroSVIModule(normal_mean), loader)
    assert start.seen == before
    assert random_states() != before  # the fit itself does draw


def test_the_first_loss_draws_the_noise_that_a_later_one_does():
    svi = PyroSVIModule(normal_mean, dataset_size=N)
    torch.manual_seed(5)
    first = svi.loss(DATA[:B])
    torch.manual_seed(5)
    assert torch.equal(svi.loss(DATA[:B]), first)


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=self.norm(x[:, None])[:, 0])


def test_set_up_leaves_the_buffers_of_batch_norm():
    svi = PyroSVIModule(Normalised())
    norm = svi.model.norm
    start = AtStart(lambda: (norm.num_batches_tracked.item(), norm.running_mean.item()))
    quiet_trainer(max_epochs=1, callbacks=start).fit(svi, rows())
    assert start.seen == (0, 0.0)
    assert norm.num_batches_tracked.item() == N // B


class WhereMade(Dataset):
    """Rows that tell which process made them; in this process the visits are kept as well."""

    def __init__(self):
        self.visits = 0

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.visits += 1
        return DATA[index], os.getpid()


class KeepsProcesses(PyroSVIModule):
    def __init__(self):
        super().__init__(normal_mean)
        self.processes = set()

    def model_inputs(self, batch):
        self.processes.update(batch[1].tolist())
        return (batch[0],), {}


def test_set_up_starts_no_worker_process():
    data, svi = WhereMade(), KeepsProcesses()
    before = set(multiprocessing.active_children())
    started = lambda: set(multiprocessing.active_children()) - before  # noqa: E731
    start = AtStart(lambda: (started(), set(svi.processes)))
    loader = DataLoader(data, batch_size=10, num_workers=2, shuffle=True)
    quiet_trainer(max_epochs=1, callbacks=start).fit(svi, loader)
    assert start.seen == (set(), {os.getpid()})
    assert data.visits == 10  # one batch here; all others were made elsewhere
    assert len(svi.processes - {os.getpid()}) == 2


class CountingSampler(RandomSampler):
    starts = 0

    def __iter__(self):
        self.starts += 1
        return super().__iter__()


def test_set_up_does_not_advance_the_sampler():
    generator = torch.Generator().manual_seed(3)
    sampler = CountingSampler(DATA, generator=generator)
    before = generator.get_state()
    start = AtStart(lambda: (sampler.starts, torch.equal(generator.get_state(), before)))
    loader = DataLoader(TensorDataset(DATA), batch_size=B, sampler=sampler)
    quiet_trainer(max_epochs=2, callbacks=start).fit(PyroSVIModule(normal_mean), loader)
    assert start.seen == (0, True)
    assert sampler.starts == 2


def test_loss_makes_lazy_parameters_without_a_trainer():
    svi = PyroSVIModule(normal_mean, dataset_size=N)
    assert not list(svi.parameters())
    loss = svi.loss(DATA[:B])
    torch.autograd.grad(loss, list(svi.parameters()))  # raises where a parameter has no part


def test_loss_without_n_is_refused():
    with pytest.raises(RuntimeError, match="not known yet.*dataset_size=N"):
        PyroSVIModule(normal_mean, elbo=Trace_ELBO()).loss(DATA[:B])
