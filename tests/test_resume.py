"""A fit that goes on from a checkpoint is the one that was not interrupted, bit for bit."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
)
from pyro.infer import TraceGraph_ELBO
from resume_support import (
    ADAM,
    Events,
    Fit,
    Saver,
    arrays,
    assert_equal,
    assert_goes_on,
    global_model,
    make,
    model,
    rows,
)
from support import quiet_trainer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from pyro_lightning import PyroSVIModule

HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
)
PLATEAU = partial(ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.05)


def watching(name):
    return lambda optimizer: {"scheduler": PLATEAU(optimizer), "monitor": name}


# -- every hook ----------------------------------------------------------------------------------


# An epoch has 6 batches: each list has places in it, the last batch, and the second epoch's first.
@pytest.mark.parametrize(
    ("options", "flags", "at"),
    [
        pytest.param({}, {}, [0, 1, 2, 6, 12, 13, 14, 15, 16, -1], id="one epoch after another"),
        pytest.param(
            {"val": 6},
            {"val_check_interval": 2},
            [4, 5, 6, 7, 8, 9, 12, 20, 21, 24, 25, 26, -1],
            id="validations in the middle of an epoch",
        ),
        pytest.param(
            {"val": 6},
            {"max_steps": 15, "max_epochs": -1},
            [3, 12, 13, 16, 17, 18, 20],
            id="a number of steps",
        ),
        pytest.param(
            {"val": 6},
            {"accumulate_grad_batches": 4, "val_check_interval": 3},
            [3, 4, 8, 9, 10, 16, 20],
            id="gradients of several batches",
        ),
        pytest.param({"val": 6}, {"limit_train_batches": 4}, [7, 8, 13], id="a part of an epoch"),
    ],
)
def test_a_fit_goes_on_from_every_hook(tmp_path, options, flags, at):
    assert_goes_on(tmp_path, make(), rows(**options), HOOKS, at, **flags)


@pytest.mark.parametrize("figure", ["train_loss", "val_loss"])
def test_a_scheduler_that_watches_a_figure_goes_on(tmp_path, figure):
    made = make(lr_scheduler=watching(figure))
    hooks = "on_train_batch_end", "on_validation_end", "on_train_epoch_end"
    whole = assert_goes_on(tmp_path, made, rows(val=6), hooks, [3, 5, 6, 7, 15], max_epochs=4)
    assert whole.optimizer["param_groups"][0]["lr"] < 0.05  # there was something to go on with


def test_a_scheduler_of_steps_goes_on(tmp_path):
    def decay(optimizer):
        scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
        return {"scheduler": scheduler, "interval": "step"}

    assert_goes_on(tmp_path, make(lr_scheduler=decay), rows(), at=[2, 5, 8], max_epochs=2)


@pytest.mark.parametrize("shuffle", [False, "blocks"])
def test_other_orders_go_on(tmp_path, shuffle):
    assert_goes_on(tmp_path, make(), rows(shuffle=shuffle), at=[3, 8], max_epochs=2)


def test_steps_of_one_batch_go_on(tmp_path):
    made, data = make(steps_per_batch=2), rows(val=6)
    assert_goes_on(tmp_path, made, data, HOOKS, [1, 2, 3, 4, 14, 18], val_check_interval=1)


def test_an_accumulation_that_changes_goes_on(tmp_path):
    scheduling = partial(GradientAccumulationScheduler, {0: 1, 1: 4})
    assert_goes_on(tmp_path, make(), rows(), at=[2, 7, 9], callbacks=[scheduling], max_epochs=2)


def test_a_fit_that_is_about_to_stop_stops(tmp_path):
    stopping = partial(EarlyStopping, "val_loss", patience=1, min_delta=20.0)
    hooks = "on_train_batch_end", "on_validation_end", "on_train_epoch_end"
    options = {"callbacks": [stopping], "max_epochs": 9}
    whole = assert_goes_on(tmp_path, make(), rows(val=6), hooks, [-10, -3, -2, -1], **options)
    assert 1 < whole.trainer.current_epoch < 9


def test_a_fit_that_stopped_goes_on_for_as_long_as_it_is_told_to(tmp_path):
    stopping = partial(EarlyStopping, "val_loss", patience=1, min_delta=1e6)
    first = Fit(make(), rows(val=6), callbacks=[stopping], max_epochs=9)
    assert first.trainer.current_epoch == 2
    first.trainer.save_checkpoint(path := tmp_path / "stopped.ckpt")
    again = Fit(make(), rows(val=6), [stopping], path, max_epochs=9)
    assert again.trainer.current_epoch == 2
    again = Fit(make(), rows(val=6), [stopping], path, max_epochs=9, min_epochs=4)
    assert again.trainer.current_epoch == 4


def test_the_noise_of_training_is_the_same_without_validations():
    flags = {"max_epochs": 2, "val_check_interval": 2}
    with_them, without = (Fit(make(), rows(val=6), **flags, limit_val_batches=n) for n in (1.0, 0))
    assert_equal(with_them.state, without.state)
    assert len(with_them.events.seen) > len(without.events.seen)


def test_a_second_fit_of_a_trainer_goes_on(tmp_path):
    """In its first epoch, and no other, Lightning makes a second iterator by itself."""

    def fit(path=None, saver=()):
        torch.manual_seed(0 if path is None else 9)
        svi, data = make(global_model)(), loader(shuffle=True)
        trainer = quiet_trainer(max_epochs=1, callbacks=[*saver], enable_checkpointing=bool(saver))
        if path is None:
            trainer.fit(svi, data)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(svi, data, ckpt_path=path)
        return dict(svi.named_parameters())

    saver = Saver(tmp_path, Events(), ["on_train_batch_end"])
    whole = fit(saver=[saver])
    assert_equal(fit(saver.saved[8][0]), whole)


# -- state of the model --------------------------------------------------------------------------


def coin(x):
    """A latent without a reparameterised gradient, for which an ELBO keeps running averages."""
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def coin_guide(x):
    a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
    infer = {"baseline": {"use_decaying_avg_baseline": True}}
    pyro.sample("p", dist.Beta(a, a).has_rsample_(False), infer=infer)


def test_the_baselines_of_an_elbo_go_on(tmp_path):
    data = lambda: {"train_dataloaders": DataLoader((arrays()[1] > 0).float(), batch_size=4)}  # noqa: E731
    made = make(coin, guide=coin_guide, elbo=TraceGraph_ELBO())
    whole = assert_goes_on(tmp_path, made, data, at=[3, 7], max_epochs=2)
    assert whole.svi._baselines.averages


class Network(PyroSVIModule):
    """A network with noise of its own, and running statistics; a global."""

    def __init__(self):
        super().__init__(optimizer=ADAM)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 5),
            torch.nn.BatchNorm1d(5),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(5, 1),
        )

    def model(self, x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1) + bias, 1.0), obs=y)


def test_dropout_and_running_statistics_go_on(tmp_path):
    assert_goes_on(tmp_path, Network, rows(val=6), at=[2, 5, 7], max_epochs=2)


def test_noise_of_python_and_numpy_goes_on(tmp_path):
    def noisy(x, y):
        shift = np.random.normal() * 0.1
        global_model(x + shift, y)

    assert_goes_on(tmp_path, make(noisy, checks=False), rows(), at=[2, 7], max_epochs=2)


# -- loaders -------------------------------------------------------------------------------------


class Shifted(Dataset):
    """Draws noise for each item that it is asked for, and tells which were."""

    def __init__(self):
        self.x, self.y = arrays()
        self.read = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.read.append(index)
        return self.x[index] + 0.1 * torch.randn(2), self.y[index]


class Stream(IterableDataset):
    """Rows in an order of their own."""

    def __iter__(self):
        return iter(list(zip(*arrays(), strict=True)))


class LazyLoader(DataLoader):
    """Begins when its first batch is asked for."""

    def __iter__(self):
        yield from super().__iter__()


class Batches:
    """Batches in one order."""

    def __iter__(self):
        return iter(loader())


class Countdown:
    """A loader with a state of its own."""

    def __init__(self):
        self.batches, self.at = list(DataLoader(TensorDataset(*arrays()), batch_size=4)), 0

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[-self.at]
        self.at = 0

    def __len__(self):
        return len(self.batches)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def loader(kind=DataLoader, dataset=None, **options):
    dataset = TensorDataset(*arrays()) if dataset is None else dataset
    return kind(dataset, **{"batch_size": 4, **options})


def own(seed=5):
    return torch.Generator().manual_seed(seed)


def batches_of_five():
    dataset = TensorDataset(*arrays())
    return DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 5, True))


def permuted_by_numpy():
    class Permuted(RandomSampler):
        def __iter__(self):
            return iter(np.random.permutation(22).tolist())

    return loader(sampler=Permuted(range(22)))


LOADERS = {
    "in order": loader,
    "shuffled": lambda: loader(shuffle=True),
    "a generator of the loader's own": lambda: loader(shuffle=True, generator=own()),
    "a generator of the sampler's own": lambda: loader(
        sampler=RandomSampler(range(22), replacement=True, generator=own())
    ),
    "weighted": lambda: loader(sampler=WeightedRandomSampler(torch.arange(22.0), 22)),
    "a part": lambda: loader(sampler=SubsetRandomSampler(range(3, 20))),
    "a batch sampler": batches_of_five,
    "a sampler of NumPy's noise": permuted_by_numpy,
    "noise in the data set": lambda: loader(dataset=Shifted(), shuffle=True),
    "a loader that begins late": lambda: loader(LazyLoader, shuffle=True),
    "batches without a loader": Batches,
    "a stream": lambda: loader(dataset=Stream()),
    "a loader with a state": Countdown,
    "two loaders": lambda: [loader(shuffle=True), loader(shuffle=True)],
}


class Remade(LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)


class Joined(PyroSVIModule):
    def model_inputs(self, batch):
        if isinstance(batch[0], list | tuple):
            batch = [torch.cat(pair) for pair in zip(*batch, strict=True)]
        return tuple(batch), {}

    def num_rows(self, batch):
        return len(self.model_inputs(batch)[0][0])


@pytest.mark.parametrize("name", LOADERS)
def test_the_rows_of_an_epoch_go_on(tmp_path, name):
    made = partial(Joined, global_model, optimizer=ADAM, dataset_size=22)
    data = lambda: {"train_dataloaders": LOADERS[name]()}  # noqa: E731
    hooks = "on_train_batch_end", "on_train_epoch_end"
    assert_goes_on(tmp_path, made, data, hooks, [0, 2, -5], max_epochs=2)


@pytest.mark.parametrize("epochs", [1, 2])
def test_loaders_that_are_made_anew_go_on(tmp_path, epochs):
    """They draw a seed each time that they are made."""
    hooks = "on_train_batch_end", "on_train_epoch_end"
    flags = {"reload_dataloaders_every_n_epochs": epochs, "max_epochs": 4}
    assert_goes_on(tmp_path, make(global_model), Remade, hooks, [3, 6, 9, 13], **flags)


@pytest.mark.parametrize("persistent", [True, False])
def test_the_rows_of_workers_go_on(tmp_path, persistent):
    data = lambda: {  # noqa: E731
        "train_dataloaders": loader(shuffle=True, num_workers=1, persistent_workers=persistent)
    }
    assert_goes_on(tmp_path, make(global_model), data, at=[1, 8], max_epochs=2)


def test_rows_of_arrays_in_workers_go_on(tmp_path):
    assert_goes_on(tmp_path, make(), rows(num_workers=1), at=[1, 8], max_epochs=2)


# -- what a checkpoint holds, and what it is refused for -----------------------------------------


class Annealing(Callback):
    """Has a state, and draws no random numbers."""

    weight = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weight += 0.01
        pl_module.weight = self.weight

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight = state["weight"]


class Annealed(PyroSVIModule):
    weight = 1.0

    def model(self, x, y):
        with pyro.poutine.scale(scale=self.weight):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def test_the_state_of_callbacks_goes_on(tmp_path):
    made = partial(Annealed, optimizer=ADAM, checks=False)
    options = {"callbacks": [Annealing], "max_epochs": 2}
    assert_goes_on(tmp_path, made, rows(), at=[2, 5, 9], **options)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in the middle of an epoch."""
    fit = Fit(make(), rows(), saver=lambda events: Saver(tmp_path, events, ["on_train_batch_end"]))
    return fit.saver.saved[7][0]


def test_a_checkpoint_is_read_without_running_code(saved):
    kept = torch.load(saved, weights_only=True)["pyro_lightning_resume"]
    assert len(kept["ranks"]) == 1


def test_weights_alone_have_no_random_states(tmp_path):
    fit = Fit(make(), rows(), max_epochs=1)
    fit.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "pyro_lightning_resume" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


def changed(path, change):
    """Change what is kept in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def of_two_processes(checkpoint):
    checkpoint["pyro_lightning_resume"]["ranks"] *= 2


def test_another_number_of_processes_is_refused_in_the_middle_of_an_epoch(saved):
    message = "saved by 2 processes in the middle of an epoch, after 2 batches.*there are 1 now"
    with pytest.raises(ValueError, match=message):
        Fit(make(), rows(), ckpt_path=changed(saved, of_two_processes))


def test_another_number_of_processes_is_warned_of_after_an_epoch(tmp_path):
    fit = Fit(make(), rows(), max_epochs=1)
    fit.trainer.save_checkpoint(path := tmp_path / "end.ckpt")
    with pytest.warns(UserWarning, match="saved by 2 processes, and there are 1 now"):
        Fit(make(), rows(), ckpt_path=changed(path, of_two_processes), max_epochs=2)


def test_another_loader_is_refused_in_the_middle_of_an_epoch(saved):
    with pytest.raises(ValueError, match="after 2 of 6 batches of an epoch, and the loader has 11"):
        Fit(make(), rows(batch_size=2), ckpt_path=saved)


def test_a_checkpoint_without_random_states_is_warned_of(saved):
    path = changed(saved, lambda checkpoint: checkpoint.pop("pyro_lightning_resume"))
    with pytest.warns(UserWarning, match="has no random states"):
        again = Fit(make(), rows(), ckpt_path=path)
    assert again.trainer.global_step == 18  # the batches that were done are left out


def test_a_loader_that_begins_again_in_an_epoch_is_warned_of(tmp_path):
    made = partial(Joined, global_model, optimizer=ADAM, dataset_size=22)
    short = TensorDataset(*arrays(6))
    data = lambda: {"train_dataloaders": [loader(shuffle=True), loader(dataset=short)]}  # noqa: E731
    hooks = ["on_train_batch_end"]
    fit = Fit(made, data, saver=lambda events: Saver(tmp_path, events, hooks), max_epochs=1)
    with pytest.warns(UserWarning, match="shorter than the epoch has begun again"):
        again = Fit(made, data, ckpt_path=fit.saver.saved[3][0], max_epochs=1)
    assert again.trainer.global_step == 6


# What we skip is said to Lightning in the hook that is left out.
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_hook_that_does_not_call_ours_is_refused(saved):
    class Forgets(PyroSVIModule):
        def on_train_start(self):
            pass

    with pytest.raises(RuntimeError, match=r"Forgets.on_train_start: have yours call super\(\)"):
        Fit(make_of(Forgets), rows(), ckpt_path=saved)


def make_of(kind):
    return partial(kind, model, optimizer=ADAM)
