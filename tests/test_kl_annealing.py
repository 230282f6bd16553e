"""KLAnnealing in fits: the weights of steps, what is logged, and what is refused."""

import math
from functools import partial
from itertools import cycle

import pyro
import pyro.distributions as dist
import pytest
import torch
from annealing_support import Seen, linear
from compiled_models import rows as rows_model
from elbo_models import GivenNoise
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from pyro.infer import RenyiELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from resume_support import ADAM, arrays, assert_goes_on, global_model, make, rows
from steps_support import assert_same_fit, fit
from support import normal_mean, quiet_trainer
from torch import nn

from pyro_lightning import ArrayDataModule, KLAnnealing, PyroSVIModule

N, B = 20, 5
X = torch.linspace(-1.0, 2.0, N)


class ExactGuide(PyroModule):
    """``mu ~ N(m, s)`` by two draws a sd to either side, whose mean of squares is exact."""

    def __init__(self):
        super().__init__()
        self.m, self.log_s = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(-1.0))
        self.noise = cycle([torch.tensor(1.0), torch.tensor(-1.0)])

    def forward(self, x):
        pyro.sample("mu", GivenNoise(self.m, self.log_s.exp(), self.noise))


def exact_loss(batch, m, s, weight):
    """Negative ELBO of :func:`normal_mean` with the KL weighed, its prior of sd 0.1."""
    per_row = 0.5 * math.log(2 * math.pi) + 0.5 * ((batch - m) ** 2 + s**2)
    kl = 0.5 * ((s**2 + m**2) / 0.01 - 1) - torch.log(s / 0.1)
    return N / B * per_row.sum() + weight * kl


def exact_fit(*callbacks, **flags):
    elbo = TraceMeanField_ELBO(num_particles=2)
    svi = PyroSVIModule(normal_mean, ExactGuide(), elbo, partial(torch.optim.SGD, lr=1e-4))
    trainer = quiet_trainer(callbacks=[*callbacks], max_epochs=3, **flags)
    data = ArrayDataModule(X, batch_size=B, val=X[:5])
    trainer.fit(svi, datamodule=data)
    return svi, trainer


def test_losses_and_gradients_of_steps_are_those_of_the_closed_form():
    seen = Seen()
    exact_fit(KLAnnealing(steps=8, start=0.2), seen)
    assert len(seen.losses) == 12
    for step, (batch, before, after, loss) in enumerate(seen):
        m, log_s = (tensor.clone().requires_grad_() for tensor in before)
        expected = exact_loss(batch, m, log_s.exp(), linear(step, 8, 0.2))
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        gradients = torch.autograd.grad(expected, (m, log_s))
        for old, new, gradient in zip(before, after, gradients, strict=True):
            # The parameters' rounding, 1e-7, over the learning rate.
            torch.testing.assert_close((old - new) / 1e-4, gradient, rtol=1e-3, atol=3e-3)


def test_weights_of_epochs_are_constant_in_them():
    seen = Seen()
    exact_fit(KLAnnealing(epochs=2, start=0.5), seen)
    assert seen.weights == pytest.approx([0.5] * 4 + [0.75] * 4 + [1.0] * 4)


def test_validation_and_loss_have_weight_1():
    class Losses(Callback):
        def __init__(self):
            self.found = []

        def keep(self, pl_module, loss):
            m, log_s = (p.detach() for p in pl_module.parameters())
            self.found.append((loss, exact_loss(X[:5], m, log_s.exp(), 1.0)))

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.keep(pl_module, pl_module.loss(X[:5]).detach())

        def on_validation_end(self, trainer, pl_module):
            self.keep(pl_module, trainer.callback_metrics["val_loss"])

    losses = Losses()
    exact_fit(KLAnnealing(steps=11), losses, num_sanity_val_steps=0)
    assert len(losses.found) == 12 + 3
    for loss, expected in losses.found:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps_per_batch", [1, 4])
def test_weights_are_logged_beside_the_steps_that_they_weigh(tmp_path, steps_per_batch):
    trainer = {
        "callbacks": [KLAnnealing(steps=20)],
        "logger": CSVLogger(tmp_path),
        "log_every_n_steps": 3,
    }
    fit(steps_per_batch, trainer=trainer)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    table = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    logged = [
        (int(row["step"]), float(row["kl_weight"]))
        for row in table
        if row["kl_weight"] and row["train_loss_per_obs_step"]
    ]
    assert logged
    assert logged == [(step, pytest.approx(linear(step, 20))) for step, _ in logged]
    # At the end of an epoch, 11 steps, the weight of its last one.
    ends = [float(row["kl_weight"]) for row in table if row["train_loss"]]
    assert ends == pytest.approx([linear(10, 20), 1.0, 1.0])


# -- ways to take a step -----------------------------------------------------------------------


def annealed(steps_per_batch, *others, **options):
    trainer = {"callbacks": [KLAnnealing(steps=23, start=0.1), *others]}
    return fit(steps_per_batch, trainer=trainer, **options)


def test_several_steps_in_one_have_the_weights_of_steps_one_by_one():
    assert_same_fit(annealed(4), annealed(1), rtol=0, atol=0)


@pytest.mark.parametrize("steps_per_batch", [1, 4])
def test_compiled_steps_read_the_weight(steps_per_batch):
    # By inductor once; the other runs the traced graph as it is.
    options = {"backend": "eager"} if steps_per_batch == 1 else "strict"
    compiled = annealed(steps_per_batch, compile=options)
    assert compiled[0]._compiled.traces == 1
    eager = annealed(1)
    # As near as compiled fits without a weight are to eager ones; the weight alone moves them far.
    assert_same_fit(compiled, eager, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same_fit(fit(1), eager, rtol=1e-2, atol=1e-2)


def test_compiled_steps_read_the_weight_of_latents_of_rows():
    found = annealed(4, model=rows_model, compile={"backend": "eager"})
    assert found[0]._compiled.traces == 1
    expected = annealed(1, model=rows_model)
    assert_same_fit(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_same_fit(fit(1, model=rows_model), expected, rtol=1e-2, atol=1e-2)


def test_a_second_fit_compiled_without_annealing_has_no_weight():
    def fits(**options):
        torch.manual_seed(0)
        svi = PyroSVIModule(global_model, optimizer=ADAM, **options)
        data = ArrayDataModule(arrays(), batch_size=11)
        for callbacks in ([KLAnnealing(epochs=14)], [], [KLAnnealing(epochs=14)]):
            torch.manual_seed(1)
            quiet_trainer(max_epochs=15, callbacks=callbacks).fit(svi, datamodule=data)
        return svi

    compiled, eager = fits(compile={"backend": "eager"}), fits()
    assert compiled.kl_weight is None
    assert compiled._compiled.traces == 2
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"steps_per_batch": 2}, {"compile": {"backend": "eager"}}],
    ids=["one step", "several", "compiled"],
)
def test_a_fit_goes_on_with_the_weights_that_it_would_have_had(tmp_path, options):
    # With latents of each row, in the middle of an epoch and at its end.
    assert_goes_on(
        tmp_path,
        make(**options),
        rows(),
        at=(1, -1),
        callbacks=[partial(KLAnnealing, steps=15)],
        max_epochs=4,
    )


def test_latents_of_rows_are_weighed():
    # At weight w the optimum is the prior times the likelihood to the power 1/w: of y ~ N(z, 1) and
    # z ~ N(0, 1) a Normal of mean y / (1 + w) and precision 1 + 1/w.
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    torch.manual_seed(0)
    svi = PyroSVIModule(
        model,
        elbo=TraceMeanField_ELBO(num_particles=20, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97),
    )
    svi.anneal_kl(lambda steps, epochs: 0.25)
    y = torch.tensor([2.0, -1.0, 0.5, 1.0])
    quiet_trainer(max_epochs=120).fit(svi, datamodule=ArrayDataModule(y, batch_size=2))
    # The learning rate ends at 2.6e-3; at weight 1 means would be y / 2 and sds 0.71.
    torch.testing.assert_close(svi.guide.locs.z.detach(), y / 1.25, rtol=0, atol=0.05)
    sds = svi.guide.scales.z.detach()
    torch.testing.assert_close(sds, torch.full((4,), 0.2**0.5), rtol=0.08, atol=0)


def test_the_posterior_is_right_after_annealing():
    torch.manual_seed(0)
    x = torch.randn(200, generator=torch.Generator().manual_seed(2)) + 1.0
    svi = PyroSVIModule(
        normal_mean,
        elbo=TraceMeanField_ELBO(num_particles=20, vectorize_particles=True),
        optimizer=partial(torch.optim.Adam, lr=0.05),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.92),
    )
    trainer = quiet_trainer(max_epochs=60, callbacks=[KLAnnealing(epochs=10, cycles=2)])
    trainer.fit(svi, datamodule=ArrayDataModule(x, batch_size=20))
    draws, sd = svi.posterior_samples(20_000)["mu"], (100 + 200) ** -0.5
    # The learning rate ends at 3e-4, far below a tenth of an sd of 0.058.
    assert float(draws.mean()) == pytest.approx(float(x.sum() / 300), abs=0.1 * sd)
    assert float(draws.std()) == pytest.approx(sd, rel=0.05)


# -- what is refused ---------------------------------------------------------------------------


def begin(*callbacks, svi=None, data=None, **flags):
    svi = PyroSVIModule(normal_mean) if svi is None else svi
    data = {"datamodule": ArrayDataModule(X, batch_size=B)} if data is None else data
    quiet_trainer(callbacks=[*callbacks], **flags).fit(svi, **data)
    return svi


@pytest.mark.parametrize(
    ("annealing", "flags"),
    [
        ({"steps": 12}, {"max_epochs": 3}),
        ({"steps": 9}, {"max_epochs": 3, "max_steps": 9}),
        ({"epochs": 3}, {"max_epochs": 3}),
        ({"epochs": 2}, {"max_epochs": 3, "max_steps": 8}),
        ({"epochs": 2}, {"max_epochs": -1, "max_steps": 8}),
        ({"steps": 6}, {"max_epochs": 3, "accumulate_grad_batches": 2}),
        ({"steps": 6}, {"max_epochs": 3, "limit_train_batches": 2}),
    ],
)
def test_a_fit_that_would_end_before_is_refused(annealing, flags):
    with pytest.raises(ValueError, match="would not be over when the fit is"):
        begin(KLAnnealing(**annealing), **flags)
    name, length = next(iter(annealing.items()))
    begin(KLAnnealing(**{name: length - 1}), **flags)


def test_steps_of_a_batch_count_in_the_end_of_a_fit():
    svi = PyroSVIModule(normal_mean, steps_per_batch=2)
    with pytest.raises(ValueError, match="after 9 steps"):  # 3 epochs of at least 3 steps
        begin(KLAnnealing(steps=9), svi=svi, max_epochs=3)
    begin(KLAnnealing(steps=8), svi=svi, max_epochs=3)


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 6


def test_a_fit_without_an_end_is_refused_unless_it_is_meant():
    with pytest.raises(ValueError, match="no end that is known.*unlimited=True"):
        begin(KLAnnealing(steps=3), max_epochs=-1)
    svi = begin(KLAnnealing(steps=3, unlimited=True), Stop(), max_epochs=-1)
    assert svi.kl_weight is None  # of no fit that runs


def test_a_fit_that_is_stopped_before_warns():
    with pytest.warns(UserWarning, match="ended at KL weight 0.5, before"):
        begin(KLAnnealing(steps=10), Stop(), max_epochs=3)


def test_a_fit_that_fails_leaves_no_weight():
    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise KeyError("on the way")

    svi = PyroSVIModule(normal_mean)
    with pytest.raises(KeyError, match="on the way"):
        begin(KLAnnealing(steps=10), Fail(), svi=svi, max_epochs=3)
    assert svi._kl_scale is None


def test_an_elbo_without_a_kl_is_refused():
    svi = PyroSVIModule(normal_mean, elbo=RenyiELBO(num_particles=2))
    with pytest.raises(ValueError, match="RenyiELBO is no sum"):
        begin(KLAnnealing(steps=2), svi=svi, max_epochs=3)


def test_a_training_step_that_goes_past_the_weight_is_refused():
    class Own(PyroSVIModule):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    with pytest.raises(RuntimeError, match="Own.training_step does not call"):
        begin(KLAnnealing(steps=2), svi=Own(normal_mean), max_epochs=3)


def test_a_latent_that_depends_on_one_that_is_summed_out_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            label = pyro.sample("label", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(label, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + 0.5 * x, 1.0))

    svi = PyroSVIModule(model, guide, TraceEnum_ELBO(max_plate_nesting=1))
    with pytest.raises(ValueError, match="a latent of the guide depends on one"):
        begin(KLAnnealing(steps=2), svi=svi, max_epochs=3)


def test_another_module_is_refused():
    class Other(LightningModule):
        pass

    with pytest.raises(TypeError, match="serves a PyroSVIModule, got Other"):
        KLAnnealing(steps=2).setup(quiet_trainer(), Other(), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either steps or epochs"),
        ({"steps": 2, "epochs": 2}, "either steps or epochs"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"epochs": 2, "start": 1.0}, "start must lie in"),
        ({"epochs": 2, "cycles": 3}, "3 cycles do not fit"),
        ({"epochs": 2, "ramp": 1.5}, r"ramp must lie in \(0, 1\]"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        KLAnnealing(**arguments)


def test_two_of_them_are_refused():
    with pytest.raises(ValueError, match="two KLAnnealing"):
        begin(KLAnnealing(steps=2), KLAnnealing(epochs=2), max_epochs=3)
