"""Fits of one rank's share in one process: what a repeated row does, and where nothing is cut."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_support import AS_TRACED
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from padding_models import DTYPE, LOC, LOG_SCALE, SLOPE, TRAIN, Guide, Model, exact
from pyro.infer import TraceGraph_ELBO
from support import no_validation, quiet_trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from pyro_lightning import IndexedDataset, PyroSVIModule
from pyro_lightning._lightning import loaders_of_batch

ROWS, RANKS = 11, 2
X = torch.linspace(-1, 1, ROWS)


def share(rank, data=None, size=5, batch_sampler=None, **options):
    """A rank's loader: 6 of 11 rows, in batches of 5 and 1; on rank 1 the last is a repeat."""
    data = X if data is None else data
    sampler = DistributedSampler(data, num_replicas=RANKS, rank=rank, shuffle=False)
    if batch_sampler is not None:
        return DataLoader(data, batch_sampler=batch_sampler(sampler, size, False))
    return DataLoader(data, batch_size=size, sampler=sampler, **options)


class Watched(PyroSVIModule):
    """Keeps how many rows its model sees."""

    def __init__(self, **options):
        super().__init__(optimizer=partial(torch.optim.SGD, lr=0.0), **options)
        self.seen = []

    def model(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def on_train_start(self):
        self.seen.clear()

    on_validation_start = on_train_start

    def model_inputs(self, batch):
        self.seen.append(len(batch))
        return super().model_inputs(batch)


def trained(svi, loader, **options):
    quiet_trainer(max_epochs=1, num_sanity_val_steps=0, **options).fit(svi, loader)
    return svi


@pytest.mark.parametrize(
    ("size", "seen"), [(5, [5, 1]), (3, [3, 2]), (6, [5])], ids=["alone", "full", "one batch"]
)
@no_validation
def test_the_model_sees_no_repeat_unless_it_is_all_there_is(size, seen):
    assert trained(Watched(), share(1, size=size)).seen == seen


@no_validation
def test_a_rank_without_repeats_sees_all_its_rows():
    assert trained(Watched(), share(0, size=3)).seen == [3, 3]


@no_validation
def test_an_epoch_that_ends_before_the_repeat_is_as_it_was():
    svi = trained(Watched(), share(1, size=3), limit_train_batches=1)
    assert svi.seen == [3]
    assert svi.batch_weight(X[:3]) == 1.0


def test_a_validation_step_sees_no_repeat():
    svi = Watched(dataset_size=ROWS)
    quiet_trainer().validate(svi, share(1, size=3), verbose=False)
    assert svi.seen == [3, 2]


def test_a_loss_of_a_repeat_alone_weighs_nothing_in_a_validation():
    svi = Watched(dataset_size=ROWS)
    figures = []
    for limit in (1, 2):
        trainer = quiet_trainer(limit_val_batches=limit)
        torch.manual_seed(0)
        figures += trainer.validate(svi, share(1), verbose=False)
    assert figures[0] == figures[1]


class Cut(Watched):
    """Keeps the rows that a step of the user's own is handed."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.cut.append(self.without_repeats(batch, batch_idx, dataloader_idx).tolist())


def test_a_users_step_can_cut_repeats_off_each_loader():
    svi = Cut(dataset_size=ROWS)
    svi.cut = []
    quiet_trainer().validate(svi, [share(1), share(1, X[:7], size=4)], verbose=False)
    rows = [X[1::2].tolist(), [], X[1:7:2].tolist()]
    assert svi.cut == rows


def test_outside_a_trainer_nothing_is_cut():
    assert torch.equal(Watched(dataset_size=ROWS).without_repeats(X, 1), X)


# -- state that a repeat must not touch -----------------------------------------------------------


@no_validation
@pytest.mark.parametrize(("size", "steps"), [(5, 1), (6, 1), (10, 2)])
def test_a_repeated_row_does_not_train(size, steps):
    svi = PyroSVIModule(rows_model, steps_per_batch=steps)
    trained(svi, share(1, IndexedDataset(X), size=size))
    assert svi.posterior_samples(3, rows=[1, 3, 5, 7, 9])["z"].shape == (3, 5)
    with pytest.raises(ValueError, match="rows 0 did not train"):
        svi.posterior_samples(3, rows=[0])


def rows_model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def binary(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample(
            "z", dist.Bernoulli(0.5), infer={"baseline": {"use_decaying_avg_baseline": True}}
        )
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def binary_guide(x):
    p = pyro.param("p", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        average = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("z", dist.Bernoulli(p), infer=average)


@no_validation
def test_running_averages_of_baselines_stay_as_they_were():
    svi = PyroSVIModule(binary, binary_guide, elbo=TraceGraph_ELBO())
    trained(svi, share(1))
    shapes = [shape for _, *shape in svi._baselines.averages]
    assert shapes == [[5]]  # none of the batch of one row


# -- several steps, compiled -----------------------------------------------------------------------


@no_validation
@pytest.mark.parametrize("steps", [5, 6])
def test_compiled_steps_of_all_ranks_have_the_gradient_of_all_rows(steps):
    # So small a step that the gradient of each is that of the start: SGD adds them up.
    rate, start = 1e-11, torch.tensor([LOC, LOG_SCALE, SLOPE], dtype=DTYPE)
    moved, taken = 0.0, 0
    data = TensorDataset(*TRAIN)
    for rank in range(RANKS):
        optimizer = partial(torch.optim.SGD, lr=rate)
        svi = PyroSVIModule(
            Model(), Guide(), optimizer=optimizer, steps_per_batch=steps, compile=AS_TRACED
        )
        trainer = quiet_trainer(max_epochs=1, precision="64-true")
        trainer.fit(svi, share(rank, data, size=100 * steps))
        moved = moved + torch.stack([p.detach() for p in svi.parameters()]) - start
        taken += trainer.global_step
        assert svi._compiled.compilations
    expected = torch.stack(list(exact(TRAIN)[1].values()))
    # Parameters of about 1 are rounded to 1e-16, which is 1e-8 of the way they went; the gradient
    # changes by 1e-7 of itself on it.
    torch.testing.assert_close(-moved / rate / taken, expected, rtol=1e-6, atol=0)


# -- warnings --------------------------------------------------------------------------------------


class Counted(Watched):
    def num_rows(self, batch):
        return len(batch)


class Sorted(BatchSampler):
    """A batch sampler with an order of its own."""


UNPLACED = {
    "num_rows is overridden": (Counted, lambda rank: share(rank, size=3)),
    "an order or of a size of its own": (Watched, lambda rank: share(rank, batch_sampler=Sorted)),
}


@no_validation
@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("why", UNPLACED)
def test_repeats_that_are_not_placed_are_warned_of_once_on_each_rank(why, rank):
    make, loader = UNPLACED[why]
    with pytest.warns(UserWarning, match=f"count twice here: .*{why}.*2 divides") as found:
        trained(make(), loader(rank))
    assert sum("count twice" in str(each.message) for each in found) == 1


@no_validation
def test_repeats_of_loaders_that_make_a_batch_together_are_warned_of():
    class Pairs(Watched):
        def model_inputs(self, batch):
            return super().model_inputs(batch[0])

    with pytest.warns(UserWarning, match="several loaders make a batch together"):
        trained(Pairs(dataset_size=ROWS), [share(1), share(1)])


@no_validation
def test_no_repeat_is_warned_of_where_none_comes():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the DistributedSampler repeats")
        trained(Counted(), share(1, size=3), limit_train_batches=1)
        trained(Watched(), share(1, X[:10], batch_sampler=Sorted))


# -- names of Lightning ----------------------------------------------------------------------------


class Loaders(Watched):
    def __init__(self):
        super().__init__(dataset_size=ROWS)
        self.found = []

    def training_step(self, batch, batch_idx):
        self.found.append(loaders_of_batch(self, 0))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.found.append(loaders_of_batch(self, dataloader_idx))


class Data(LightningDataModule):
    def __init__(self, train, val):
        super().__init__()
        self.train, self.val = train, val

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val


def whole():
    return DataLoader(X, batch_size=ROWS)


def test_a_step_finds_the_loader_of_its_batch():
    train, first, second = whole(), whole(), whole()
    svi = Loaders()
    data = Data(train, [first, second])
    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=0)
    assert loaders_of_batch(svi, 0) == []
    trainer.fit(svi, datamodule=data)
    assert svi.found == [[train], [first], [second]]
    assert loaders_of_batch(svi, 0) == []


def test_a_step_finds_all_loaders_that_made_its_batch():
    first, second = whole(), whole()
    svi = Loaders()
    svi.loss(X)  # such a loader can be read once
    together = CombinedLoader([first, second], "max_size")
    quiet_trainer().validate(svi, together, verbose=False)
    assert svi.found == [[first, second]]


@no_validation
def test_a_sampler_that_lightning_wrapped_has_the_size_of_the_rows_that_it_visits():
    sampler = DistributedSamplerWrapper(SubsetRandomSampler(range(7)), num_replicas=2, rank=0)
    svi = trained(Watched(), DataLoader(X, batch_size=3, sampler=sampler))
    assert svi.dataset_size == 7
