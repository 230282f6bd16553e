"""Over an epoch every observation weighs the same, whatever batches it is cut into.

At fixed parameters and noise the mean of the steps' weighted losses is the loss of the full data.
The noise of a row's latent is a column of the data, that of the global latent one seed.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta
from support import MixedGuide, MixedModel, StepLosses, mixed_rows, no_validation, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule

pytestmark = no_validation

N, B = 101, 20  # five batches of 20 and one row
LATENTS = [("global",), ("local",), ("global", "local")]
STILL = partial(torch.optim.SGD, lr=0.0)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_batch(x, rows):
    return pyro.plate("data", len(x))


def pyros_loss(svi, elbo, rows, plate, seed=0):
    """Pyro's loss of the model, at the module's parameters, by no code of this package."""
    torch.manual_seed(seed)
    svi.model.plate, svi.guide.plate = plate, plate
    try:
        return elbo.differentiable_loss(svi.model, svi.guide, *rows)
    finally:
        svi.model.plate, svi.guide.plate = by_batch, by_batch


def full_data_loss(svi, elbo):
    return pyros_loss(svi, elbo, mixed_rows(N), by_batch)


def fitted(latents, elbo=None, loader=None, optimizer=STILL, **trainer):
    """A module after one epoch at fixed parameters, what its steps returned, and its Trainer."""
    svi = PyroSVIModule(
        MixedModel(by_batch, latents), MixedGuide(by_batch, latents), elbo, optimizer
    )
    steps = StepLosses()
    trainer = quiet_trainer(max_epochs=1, callbacks=[steps], **trainer)
    trainer.fit(svi, loader or DataLoader(TensorDataset(*mixed_rows(N)), B, shuffle=True))
    return svi, steps, trainer


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("latents", LATENTS)
def test_mean_of_an_epochs_steps_is_the_full_data_loss(latents, shuffle, elbo):
    loader = DataLoader(TensorDataset(*mixed_rows(N)), B, shuffle=shuffle)
    svi, steps, trainer = fitted(latents, elbo(), loader)
    assert sorted(len(rows[0]) for rows in steps.batches) == [1, B, B, B, B, B]
    expected = full_data_loss(svi, elbo()).detach()
    mean = torch.stack(steps.losses).mean()
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=0)
    # Lightning keeps what is logged in single precision.
    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["train_loss"].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        logged["train_loss_per_obs"].double(), expected / N, rtol=1e-6, atol=0
    )


def test_batch_weight_times_loss_is_what_a_step_returns():
    svi, steps, _ = fitted(("global", "local"))
    for rows, returned in zip(steps.batches, steps.losses, strict=True):
        torch.manual_seed(steps.seed)
        weighted = svi.batch_weight(rows) * svi.loss(rows)
        torch.testing.assert_close(weighted.detach(), returned, rtol=1e-12, atol=0)


@pytest.mark.parametrize("latents", LATENTS)
def test_gradients_accumulated_over_an_epoch_are_the_full_datas(latents):
    # One SGD step of lr 1 at the epoch's end moves every parameter by minus the gradient.
    sgd = partial(torch.optim.SGD, lr=1.0)
    svi, _, _ = fitted(latents, optimizer=sgd, accumulate_grad_batches=6)
    moved = [parameter.detach().clone() for parameter in svi.parameters()]
    fresh = PyroSVIModule(MixedModel(by_batch, latents), MixedGuide(by_batch, latents))
    loss = full_data_loss(fresh, Trace_ELBO())
    parameters = list(fresh.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for new, old, gradient in zip(moved, parameters, gradients, strict=True):
        expected = old.detach() - (0.0 if gradient is None else gradient)
        torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "limit", "count"),
    [({"drop_last": True}, None, 5), ({}, 3, 3), ({}, 0.5, 3), ({"drop_last": True}, 0.5, 2)],
)
def test_epoch_cut_short_is_the_mean_over_its_own_batches(options, limit, count):
    # Then all batches are equal, so each step's loss is Pyro's own, unweighted.
    loader = DataLoader(TensorDataset(*mixed_rows(N)), B, shuffle=True, **options)
    svi, steps, trainer = fitted(("global", "local"), None, loader, limit_train_batches=limit)
    assert len(steps.losses) == count

    def by_rows(x, rows):
        return pyro.plate("data", N, subsample=rows)

    each = [pyros_loss(svi, Trace_ELBO(), rows, by_rows).detach() for rows in steps.batches]
    torch.testing.assert_close(torch.stack(steps.losses), torch.stack(each), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        trainer.callback_metrics["train_loss"].double(),
        torch.stack(each).mean(),
        rtol=1e-6,
        atol=0,
    )


def test_validation_loss_is_its_mean_per_row_scaled_to_the_training_set():
    # Validation rows of no latent of their own, the global one fixed, in ragged batches: the
    # logged figure is N / N_val times the likelihood of all of them, plus the global terms once.
    held_out = mixed_rows(N + 33)
    held_out = tuple(column[N:] for column in held_out)
    svi = PyroSVIModule(
        MixedModel(by_batch, ("global",)), MixedGuide(by_batch, ("global",)), optimizer=STILL
    )

    class Seed(StepLosses):
        def on_validation_batch_start(self, *arguments):
            torch.manual_seed(self.seed)

    trainer = quiet_trainer(max_epochs=1, callbacks=[Seed()], num_sanity_val_steps=0)
    trainer.fit(
        svi,
        DataLoader(TensorDataset(*mixed_rows(N)), B, shuffle=True),
        DataLoader(TensorDataset(*held_out), B),
    )
    rows = torch.arange(33)
    expected = pyros_loss(
        svi, Trace_ELBO(), held_out, lambda x, _: pyro.plate("data", N, subsample=rows)
    ).detach()
    logged = trainer.callback_metrics["val_loss"].double()
    torch.testing.assert_close(logged, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_outlier_alone_in_the_last_batch_weighs_one_row(shuffle):
    # 100 rows at 0 and one at 100, unit noise, prior N(0, 10): the MAP is 100 / (101 + 1/100).
    # With each batch at scale N/B and no weight it is near 50: the last batch would count as much
    # as the first, its one row standing for the whole data set.
    x = torch.zeros(101)
    x[-1] = 100.0
    expected = 100.0 / (101 + 0.01)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    # Plain SGD, since Adam divides by the size of each batch's gradient; steps that shrink, since
    # at a fixed step the two batches pull the parameter to and fro. The outlier's step is
    # 200 lr long, which must be small beside the tolerance.
    svi = PyroSVIModule(
        model,
        AutoDelta,
        optimizer=partial(torch.optim.SGD, lr=5e-3),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.97),
    )
    loader = DataLoader(x, batch_size=100, shuffle=shuffle)
    quiet_trainer(max_epochs=400).fit(svi, loader)
    assert float(svi.posterior_samples(1)["mu"]) == pytest.approx(expected, abs=0.05)
