"""Fits with parameters of each row under Lightning's flags, against loops written by hand.

The hand loop has dense gradients, and an optimizer for each row by itself.
"""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from support import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from pyro_lightning import ArrayDataModule, IndexedBatch, IndexedDataset, PyroSVIModule

N, B = 12, 4
X = torch.linspace(-1, 2, N, dtype=torch.float64)
ADAM = partial(torch.optim.Adam, lr=0.05)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def single_precision(double_precision):
    torch.set_default_dtype(torch.float32)


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(mu + z.sum(-1), 0.5), obs=x)


class Steps(Callback):
    """Draws each step's noise from a seed of its own, and keeps the batches."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(1000 * trainer.current_epoch + batch_idx)
        self.batches.append((1000 * trainer.current_epoch + batch_idx, batch))


class HandLoop:
    """Parameters of a twin of the module, each row of a table with an optimizer of its own."""

    def __init__(self, svi, make):
        self.svi = svi
        self.tables = set(svi._row_parameters())
        self.units = {}
        for name, parameter in svi.named_parameters():
            value = parameter.detach()
            rows = value.unbind(0) if name in self.tables else [value]
            self.units[name] = [nn.Parameter(row.clone()) for row in rows]
        self.optimizers = {
            name: [make([unit]) for unit in units] for name, units in self.units.items()
        }

    def gradients(self, seed, batch):
        torch.manual_seed(seed)
        loss = self.svi.loss(batch)
        named = dict(self.svi.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        return {name: g.to_dense() for name, g in zip(named, found, strict=True)}

    def step(self, gradients, rows):
        rows = set(rows.tolist())
        for name, parameter in self.svi.named_parameters():
            table = name in self.tables
            for i, unit in enumerate(self.units[name]):
                if not table or i in rows:
                    unit.grad = (gradients[name][i] if table else gradients[name]).clone()
                    self.optimizers[name][i].step()
            units = [unit.detach() for unit in self.units[name]]
            parameter.data = torch.stack(units) if table else units[0].clone()


def prepared(make=ADAM, **options):
    """A module with its parameters made, and a twin in the hands of a hand loop."""
    torch.manual_seed(4)
    svi = PyroSVIModule(model, optimizer=make, dataset_size=N, **options)
    svi.loss(IndexedBatch(X[:B], torch.arange(B)))
    return svi, HandLoop(copy.deepcopy(svi), make)


def fit(svi, data=None, **flags):
    steps = Steps()
    data = data or ArrayDataModule(X, batch_size=B)
    flags = {"max_epochs": 3, **flags, "callbacks": [steps, *flags.get("callbacks", [])]}
    quiet_trainer(**flags).fit(svi, data)
    return steps.batches


def values(svi):
    return {name: parameter.detach().clone() for name, parameter in svi.named_parameters()}


def assert_close(svi, by_hand, rtol=1e-9):
    for name, value in values(by_hand.svi).items():
        torch.testing.assert_close(values(svi)[name], value, rtol=rtol, atol=rtol)


OPTIMIZERS = {
    "Adam": ADAM,
    "amsgrad": partial(torch.optim.Adam, lr=0.05, amsgrad=True),
    "AdamW": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "SGD": partial(torch.optim.SGD, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_fit_equals_a_loop_with_an_optimizer_for_each_row(make):
    svi, by_hand = prepared(OPTIMIZERS[make])
    batches = fit(svi)
    assert len(batches) == 9
    for seed, batch in batches:
        by_hand.step(by_hand.gradients(seed, batch), batch.rows)
    assert_close(svi, by_hand)


def test_rows_outside_the_batch_do_not_move_at_all():
    # Dense Adam moves them by momentum, by 0.067 in one step of the case that this is taken from.
    class Outside(Callback):
        met = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = values(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            outside = torch.ones(N, dtype=torch.bool).index_fill(0, batch.rows, False)
            for name in pl_module._row_parameters():
                after = values(pl_module)[name]
                assert torch.equal(after[outside], self.before[name][outside])
                assert (after != self.before[name])[~outside].all()
                self.met += 1

    svi, _ = prepared()
    outside = Outside()
    fit(svi, callbacks=[outside])
    assert outside.met == 9 * 2


@pytest.mark.usefixtures("single_precision")
def test_a_step_touches_none_of_ten_million_rows_but_those_of_the_batch():
    size, rows = 10**7, torch.tensor([3, 5_000_000, 10**7 - 1])

    def scalar(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    svi = PyroSVIModule(scalar, AutoDelta, dataset_size=size)
    svi.loss(IndexedBatch(torch.ones(3), rows))
    (table,) = svi.parameters()
    before, optimizer = table.detach().clone(), svi.configure_optimizers()
    for _ in range(2):
        optimizer.zero_grad()
        svi.loss(IndexedBatch(torch.ones(3), rows)).backward()
        assert table.grad.is_sparse
        assert table.grad._nnz() == 3
        optimizer.step()
    assert torch.equal((table.detach() != before).nonzero().flatten(), rows)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradient_clipping_equals_that_of_dense_gradients(algorithm):
    svi, by_hand = prepared(partial(torch.optim.SGD, lr=0.1))
    clip = {"norm": 3.0, "value": 1.0}[algorithm]
    batches = fit(svi, gradient_clip_val=clip, gradient_clip_algorithm=algorithm)
    clipped = 0
    for seed, batch in batches:
        gradients = by_hand.gradients(seed, batch)
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        for name, g in gradients.items():
            # torch adds 1e-6 to the norm.
            scaled = g * min(1.0, clip / float(norm + 1e-6))
            gradients[name] = scaled if algorithm == "norm" else g.clamp(-clip, clip)
            clipped += int((gradients[name] != g).any())
        by_hand.step(gradients, batch.rows)
    assert clipped > len(batches)
    assert_close(svi, by_hand)


@pytest.mark.parametrize("make", ["Adam", "SGD"])
def test_accumulated_gradients_of_batches_that_share_rows(make):
    svi, by_hand = prepared(OPTIMIZERS[make])
    batches = [[0, 1, 2], [1, 2, 3], [4, 5, 6], [7, 8, 4], [9, 10, 11], [0, 1, 2]]
    loader = DataLoader(IndexedDataset(X), batch_sampler=batches)
    met = fit(svi, loader, accumulate_grad_batches=2)
    assert len(met) == 18
    for first, second in zip(met[::2], met[1::2], strict=True):
        both = [by_hand.gradients(*each) for each in (first, second)]
        mean = {name: (both[0][name] + both[1][name]) / 2 for name in both[0]}
        by_hand.step(mean, torch.cat([first[1].rows, second[1].rows]))
    assert_close(svi, by_hand)


def test_learning_rate_scheduler():
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    svi, by_hand = prepared(lr_scheduler=decay)
    for i, (seed, batch) in enumerate(fit(svi)):
        for optimizers in by_hand.optimizers.values():
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (i // 3)
        by_hand.step(by_hand.gradients(seed, batch), batch.rows)
    assert_close(svi, by_hand)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh module", "module with a loss"])
def test_resuming_from_a_checkpoint_is_as_if_never_stopped(fresh, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    straight, _ = prepared()
    # The order of the rows is the loader's: it comes from a sampler with a seed of its own.
    fit(straight, ArrayDataModule(X, batch_size=B, shuffle=False), max_epochs=5, callbacks=[Save()])
    resumed = PyroSVIModule(model, optimizer=ADAM, dataset_size=N)
    if not fresh:
        resumed.loss(IndexedBatch(X[:B], torch.arange(B)))
    quiet_trainer(max_epochs=5, callbacks=[Steps()]).fit(
        resumed,
        datamodule=ArrayDataModule(X, batch_size=B, shuffle=False),
        ckpt_path=tmp_path / "half.ckpt",
    )
    before, after = values(straight), values(resumed)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name])


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.float32), ("64-true", torch.float64)],
)
@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_precisions(guide, precision, dtype):
    svi = PyroSVIModule(model, guide, optimizer=ADAM)
    fit(svi, ArrayDataModule(X.float(), batch_size=B), precision=precision, max_epochs=100)
    assert all(parameter.dtype == dtype for parameter in svi.parameters())
    with pyro.settings.context(module_local_params=True):  # AutoDelta's median runs the guide
        medians = svi.guide.median()
    both = torch.stack([medians["z"].sum(-1), X.to(dtype)])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95  # 0.0 if rows were mixed up


@pytest.mark.usefixtures("single_precision")
@pytest.mark.parametrize("style", ["len", "subsample_size"])
def test_every_row_gets_its_own_latent(style):
    """With rows mixed up the correlation is 0.02."""
    y = torch.arange(40.0)

    def rows(y):
        size = {"len": (len(y),), "subsample_size": (40, len(y))}[style]
        with pyro.plate("data", *size):
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    svi = PyroSVIModule(rows, AutoNormal, optimizer=partial(torch.optim.Adam, lr=0.5))
    quiet_trainer(max_epochs=150).fit(svi, datamodule=ArrayDataModule(y, batch_size=10))
    z = svi.guide.median()["z"]
    assert float(torch.corrcoef(torch.stack([z, y]))[0, 1]) > 0.999


@pytest.mark.parametrize(
    "make",
    [torch.optim.RMSprop, partial(torch.optim.SGD, lr=0.1, momentum=0.9)],
    ids=["RMSprop", "SGD"],
)
def test_optimizer_that_moves_all_rows_is_refused(make):
    svi = PyroSVIModule(model, optimizer=make, elbo=Trace_ELBO())
    name = getattr(make, "func", make).__name__
    with pytest.raises(TypeError, match=rf"which {name} with these options would move.*Use Adam"):
        fit(svi)
