"""Bad batches that are skipped: as if they had not come, counted, and left out of N."""

import math
import os
import time
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from pyro.infer import TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from skip_support import NAN, STILL, B, N, fit, in_order, rows
from steps_support import assert_same_fit
from support import no_validation, normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule

pytestmark = [
    no_validation,
    pytest.mark.filterwarnings("ignore:Encountered NaN"),
    # Lightning says so, once, of a step that is not taken.
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    # What the fit says of skipped batches; the tests of it look for it.
    pytest.mark.filterwarnings("ignore:batches skipped in"),
]


# -- as if it had not come -------------------------------------------------------------------------


class Normed(nn.Module):
    """A model with running statistics, which a NaN would spoil, and dropout, which draws."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 4), nn.Dropout(), nn.Linear(4, 1))

    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        loc = self.net(x[:, None]).squeeze(-1) + mu
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)


def coins(x):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    side = pyro.sample("side", dist.Bernoulli(p))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(side, 1.0), obs=x)


def coin_guide(x):
    a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
    p = pyro.sample("p", dist.Beta(a, 2.0))
    pyro.sample("side", dist.Bernoulli(p))


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"model": Normed},
        {"model": lambda: coins, "guide": coin_guide, "elbo": TraceGraph_ELBO},
        {"optimizer": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=0.1)},
    ],
    ids=["Adam", "buffers", "baselines", "momentum"],
)
def test_the_fit_is_that_of_the_data_without_the_batch(kind):
    def made():
        torch.manual_seed(4)
        given = {**kind, "model": kind.get("model", lambda: normal_mean)()}
        return {**given, "elbo": kind["elbo"]()} if "elbo" in kind else given

    # The first batch is the bad one, so that N is right from the first step on.
    svi, trainer = fit(rows(3), **made())
    other, reference = fit(rows()[B:], **made())
    assert svi.dataset_size == other.dataset_size == N - B
    # Every pass over the data counts a step for the batch that took none.
    assert trainer.global_step == reference.global_step + 3
    reference.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total = (
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    )
    assert_same_fit((svi, trainer), (other, reference), rtol=0, atol=0)


@pytest.mark.parametrize("place", [0, 1])
def test_the_other_batches_of_an_accumulation_count(place):
    # The mean of two gradients, of which one is nothing, is half of the other.
    x = torch.cat([rows(3)[:B], rows()[B : 2 * B]][:: 1 if place == 0 else -1])
    sgd = partial(torch.optim.SGD, lr=1e-3)
    flags = {"max_epochs": 1, "accumulate_grad_batches": 2}
    svi, _ = fit(x, optimizer=sgd, dataset_size=20, trainer=flags)
    half = partial(torch.optim.SGD, lr=0.5e-3)
    # N: from the second batch on, where the bad one came first.
    size = 10 if place == 0 else 20
    other, _ = fit(rows()[B : 2 * B], optimizer=half, dataset_size=size, trainer={"max_epochs": 1})
    torch.testing.assert_close(svi.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [[], [3], [3, 9, 30]])
def test_several_steps_in_one_are_those_of_one(bad):
    def data():
        return ArrayDataModule(rows(*bad), batch_size=4)

    found = [fit(data(), steps_per_batch=steps) for steps in (1, 2)]
    assert found[0][0].dataset_size == N - len(bad)
    assert_same_fit(*found, rtol=0, atol=0)


# -- N ---------------------------------------------------------------------------------------------


def wide_mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_posterior_is_that_of_the_rows_that_can_train(shuffle):
    # Four of sixteen rows are bad. In order, each takes its neighbour with it, each time.
    bad = [1, 6, 11, 12]
    x = rows(*bad, count=16)
    kept = [i for i in range(16) if i not in ([*bad, 0, 7, 10, 13] if not shuffle else bad)]
    svi, _ = fit(
        ArrayDataModule(x, batch_size=2, shuffle=shuffle),
        wide_mean,
        steps_per_batch=8,
        elbo=TraceMeanField_ELBO(num_particles=8, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        lr_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.93),
        trainer={"max_epochs": 65},
    )
    assert svi.dataset_size == len(kept)
    draws = svi.posterior_samples(20_000)["mu"]
    sd = (1 + len(kept)) ** -0.5
    # Learning rates end at 5e-4; N = 16 would make the sd 12 % or 27 % smaller.
    assert float(draws.mean()) == pytest.approx(float(x[kept].sum()) * sd**2, abs=0.15 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.05)


def log_joint(mu, x, count):
    prior = -0.5 * (mu / 0.1) ** 2 - math.log(0.1) - 0.5 * math.log(2 * math.pi)
    each = -0.5 * (x.double() - mu) ** 2 - 0.5 * math.log(2 * math.pi)
    return prior + count * float(each.mean())


AT = 0.3
POINT = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(AT))


@pytest.mark.parametrize("size", [None, 400])
def test_train_loss_is_that_of_the_rows_that_can_train(size):
    # A stated N counts the bad rows as one that is read does.
    svi, trainer = fit(rows(12), guide=POINT, optimizer=STILL, dataset_size=size)
    kept = torch.cat([rows()[:B], rows()[2 * B :]])
    count = (size or N) * 4 // 5
    assert svi.dataset_size == count
    expected = -log_joint(AT, kept, count)
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(expected, rel=1e-6)


def test_n_is_what_is_known_of_the_epoch_so_far():
    sizes = []

    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sizes.append(pl_module.dataset_size)

    fit(rows(12, 33), trainer={"callbacks": [Sizes()], "max_epochs": 2})
    assert sizes == [40, 32, 32, 32, 24, 24, 24, 24, 24, 24]


def test_n_of_a_second_fit_is_new():
    svi, _ = fit(rows(12))
    quiet_trainer(max_epochs=1).fit(svi, in_order(rows()))
    assert svi.dataset_size == N


def test_n_goes_on_after_a_checkpoint(tmp_path):
    x, path = rows(12), tmp_path / "end.ckpt"
    _, trainer = fit(x, trainer={"max_epochs": 2})
    trainer.save_checkpoint(path)
    svi = PyroSVIModule(normal_mean, bad_batches="skip")
    sizes = []

    class First(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            sizes.append(pl_module.dataset_size)

    quiet_trainer(max_epochs=3, callbacks=[First()]).fit(svi, in_order(x), ckpt_path=path)
    assert sizes == [N - B]


@pytest.mark.parametrize("steps", [6, 8])
def test_an_epoch_that_is_cut_short_does_not_count_anew(steps):
    svi, trainer = fit(rows(0), trainer={"max_steps": steps, "max_epochs": -1})
    assert (trainer.global_step, svi.dataset_size) == (steps, N - B)


def test_lbfgs_leaves_a_batch_out():
    newton = partial(torch.optim.LBFGS, max_iter=20, line_search_fn="strong_wolfe")
    x = rows(0)
    x[2 * B :] = NAN  # one batch is left, whose optimum is known
    svi, _ = fit(x, guide=AutoDelta, optimizer=newton, trainer={"max_epochs": 1})
    mu = svi.posterior_samples(1)["mu"].item()
    # The first has taught that 1 of 5 is bad, so that the second stands for 32 rows.
    second = x[B : 2 * B].mean().item()
    assert mu == pytest.approx(32 * second / (100 + 32), rel=1e-4)


def test_a_fit_that_goes_on_without_skipping_counts_all_rows(tmp_path):
    path = tmp_path / "end.ckpt"
    _, trainer = fit(rows(12))
    trainer.save_checkpoint(path)
    svi, sizes = PyroSVIModule(normal_mean), []

    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            sizes.append(pl_module.dataset_size)

    quiet_trainer(max_epochs=4, callbacks=[Sizes()]).fit(svi, in_order(rows()), ckpt_path=path)
    assert sizes == [N] * 5


@pytest.mark.parametrize("stated", [{}, {"dataset_size": N}])
def test_a_module_from_a_checkpoint_has_the_n_that_counts(tmp_path, stated):
    svi, trainer = fit(rows(12), guide=AutoDelta, **stated)
    path, val = tmp_path / "end.ckpt", in_order(rows(count=16))
    trainer.save_checkpoint(path)
    loaded = PyroSVIModule.load_from_checkpoint(path, model=normal_mean, guide=AutoDelta, **stated)
    assert loaded.dataset_size == svi.dataset_size == N - B
    losses = []
    fresh = PyroSVIModule(normal_mean, AutoDelta, **stated)
    for module, from_file in ((svi, None), (loaded, None), (fresh, path)):
        found = quiet_trainer().validate(module, val, ckpt_path=from_file, verbose=False)
        losses.append(found[0]["val_loss"])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("of", ["plate", "scale_sites", "columns", "particles"])
def test_a_model_that_states_n_itself_has_the_n_that_counts(of):
    columns = pyro.plate("columns", 1, dim=-1)

    def stated(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if of == "columns":
            with pyro.plate("data", N, subsample_size=len(x), dim=-2), columns:
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x[:, None])
        elif of == "scale_sites":
            pyro.sample("x", dist.Normal(mu, 1.0).expand([len(x)]).to_event(1), obs=x)
        else:
            with pyro.plate("data", N, subsample_size=len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    options = {
        "plate": {},
        "scale_sites": {"data_plate": None, "scale_sites": "x"},
        "columns": {"data_plate": {"data": N, "columns": 1}},
        "particles": {"elbo": TraceMeanField_ELBO(num_particles=2, vectorize_particles=True)},
    }[of]
    svi, _ = fit(rows(12), stated, dataset_size=N, **options)
    assert svi.dataset_size == N - B
    other = PyroSVIModule(wide_mean, svi.guide, dataset_size=N - B, elbo=svi.elbo)
    losses = []
    for each in (svi, other):
        torch.manual_seed(5)
        losses.append(each.loss(rows()[:B]).item())
    # The two scales are the same number by another order of products.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_latents_of_rows_that_never_trained_are_not_drawn():
    def effects(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    for steps in (1, 2):
        data = ArrayDataModule(rows(12), batch_size=4, shuffle=False)
        svi, _ = fit(data, effects, steps_per_batch=steps)
        assert svi.dataset_size == N - 4
        svi.posterior_samples(3, rows=[11, 16])
        with pytest.raises(ValueError, match="rows 12, 15 did not train"):
            svi.posterior_samples(3, rows=[12, 15])


# -- what is told ----------------------------------------------------------------------------------


def test_each_epoch_logs_and_warns_once():
    seen = []

    class Metrics(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if "skip" in k})

    loader = in_order(rows(12, 33, 34))
    with pytest.warns(UserWarning) as told:
        fit(loader, trainer={"callbacks": [Metrics()], "max_epochs": 2})
    said = [str(each.message) for each in told if "skipped in training" in str(each.message)]
    assert len(said) == 2
    for epoch, message in enumerate(said):
        assert message.startswith(
            f"batches skipped in training epoch {epoch}: 2, with 16 of 40 rows. The first: "
            f"training batch 1 of epoch {epoch} (8 rows, 8 to 15 of the data set; at fault: "
            "12 of the data"
        )
        assert "N, 40 with all rows, counts 24" in message
    assert seen[-1] == {"train_skipped_batches": 2.0, "train_skipped_rows": 16.0}


def test_nothing_is_skipped_where_nothing_is_bad():
    svi, trainer = fit(rows())
    other, reference = fit(rows(), bad_batches="raise")
    assert trainer.callback_metrics["train_skipped_batches"] == 0
    assert "train_skipped_batches" not in reference.callback_metrics
    assert_same_fit((svi, trainer), (other, reference), rtol=0, atol=0)


def test_an_evaluation_skips_too():
    svi, trainer = fit(rows(), guide=POINT, optimizer=STILL, val=in_order(rows(3)))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    expected = -log_joint(AT, rows()[B:], N)
    assert found["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert (found["val_skipped_batches"], found["val_skipped_rows"]) == (1, B)
    (tested,) = trainer.test(svi, in_order(rows(3, 12)), verbose=False)
    assert tested["test_loss"] == pytest.approx(-log_joint(AT, rows()[2 * B :], N), rel=1e-6)
    assert (tested["test_skipped_batches"], tested["test_skipped_rows"]) == (2, 2 * B)


# -- what cannot be skipped ------------------------------------------------------------------------


def test_an_epoch_without_a_good_batch():
    x = rows()

    class Spoils(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            x.fill_(NAN)

    match = r"all 5 batches of this training epoch were skipped.*training batch 0 of epoch 0"
    with pytest.raises(ValueError, match=match):
        fit(x, trainer={"callbacks": [Spoils()]})


def test_an_evaluation_without_a_good_batch():
    val = in_order(torch.full((B,), NAN))
    with pytest.raises(ValueError, match="all 1 batches of this validation epoch were skipped"):
        fit(rows(), val=val, trainer={"num_sanity_val_steps": 0})


def test_no_good_batch_at_set_up():
    with pytest.raises(ValueError, match="the first rows of the data, .* are run at set-up"):
        fit(torch.full((N,), NAN))


def test_a_parameter_that_is_not_finite():
    class Spoils(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                next(pl_module.parameters()).data.fill_(NAN)

    with pytest.raises(ValueError, match="training batch 2 of epoch 0 .*'mu' is not finite"):
        fit(rows(), trainer={"callbacks": [Spoils()]})


def test_what_is_to_be_compiled_and_cannot():
    def looks(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu if x.sum() > 0 else -mu, 1.0), obs=x)

    with pytest.raises(RuntimeError, match="cannot be compiled"):
        fit(rows(), looks, compile="strict")


def test_a_name_that_is_no_choice():
    with pytest.raises(ValueError, match=r'bad_batches must be "raise" or "skip", got True'):
        PyroSVIModule(normal_mean, bad_batches=True)


def test_a_subclass_that_leaves_out_the_callback():
    class Bare(PyroSVIModule):
        def configure_callbacks(self):
            return []

    with pytest.raises(RuntimeError, match=r"super\(\).configure_callbacks"):
        quiet_trainer(max_epochs=1).fit(Bare(normal_mean, bad_batches="skip"), in_order(rows()))


# -- batches that a loader cannot make -------------------------------------------------------------


class Odd(Dataset):
    """Rows of which one cannot be read."""

    def __init__(self, bad, dies=False):
        self.bad, self.dies = bad, dies

    def __len__(self):
        return N

    def __getitem__(self, index):
        if index == self.bad:
            if self.dies:
                # Its end is a signal, which torch raises wherever the fit then is: let it be the
                # wait for this row.
                time.sleep(1)
                os._exit(1)
            raise OSError(f"row {index} cannot be read")
        return rows()[index]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [3, 12, 39])
def test_a_loader_that_raises(bad, workers):
    loader = DataLoader(Odd(bad), batch_size=B, num_workers=workers)
    svi, trainer = fit(loader, guide=POINT, optimizer=STILL, trainer={"max_epochs": 2})
    first = bad // B * B
    kept = torch.cat([rows()[:first], rows()[first + B :]])
    assert trainer.callback_metrics["train_skipped_rows"] == B
    assert svi.dataset_size == N - B
    expected = -log_joint(AT, kept, N - B)
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(expected, rel=1e-6)


def test_a_shuffled_loader_that_raises_leaves_out_the_one_row():
    svi, trainer = fit(DataLoader(Odd(12), batch_size=B, shuffle=True))
    assert trainer.callback_metrics["train_skipped_rows"] == B
    assert svi.dataset_size == N - 1


def test_a_validation_loader_that_raises():
    _, trainer = fit(rows(), val=DataLoader(Odd(39), batch_size=B))
    assert trainer.callback_metrics["val_skipped_rows"] == B


def test_a_batch_of_another_layout():
    class Parts(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            x = rows()[index]
            return x.double() if index // B == 2 else x

    svi, trainer = fit(DataLoader(Parts(), batch_size=B))
    assert trainer.callback_metrics["train_skipped_rows"] == B
    assert svi.dataset_size == N - B


def test_a_worker_that_dies_ends_the_fit():
    # Not one of the rows that are loaded ahead of the look at the first batch.
    loader = DataLoader(Odd(39, dies=True), batch_size=B, num_workers=1)
    with pytest.raises(RuntimeError, match=r"batch 4 of epoch 0 .*could not be loaded.*exited"):
        fit(loader)


def test_a_stream_that_raises_ends_the_fit():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from rows()[:20]
            raise OSError("connection lost")

    loader = DataLoader(Stream(), batch_size=B)
    with pytest.raises(OSError, match="batch 2 of epoch 0 could not be loaded: connection lost"):
        fit(loader, dataset_size=N)


def test_a_sampler_that_raises_ends_the_fit():
    class Order:
        def __iter__(self):
            yield [0, 1, 2, 3]
            raise OSError("the order is lost")

        def __len__(self):
            return 10

    loader = DataLoader(TensorDataset(rows()), batch_sampler=Order())
    with pytest.raises(OSError, match="the order is lost The loader has no batches after this"):
        fit(loader, dataset_size=N)


def test_a_stream_counts_the_share_of_its_rows():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from rows(12)

    svi, _ = fit(DataLoader(Stream(), batch_size=B), dataset_size=1000)
    assert svi.dataset_size == 800
