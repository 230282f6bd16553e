"""``svi.loss`` is the number that Pyro gives on ``plate("data", N, subsample=rows)``.

Pyro's side of each comparison runs without any code of this package.
"""

import math
from contextlib import nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from support import (
    MixedGuide,
    MixedModel,
    StepLosses,
    assert_equal_to_pyro,
    mixed_rows,
    no_validation,
    quiet_trainer,
    with_plate,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import PyroSVIModule

N, ROWS = 50, torch.tensor([3, 8, 20, 41])


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def by_rows(x, rows):
    """What Pyro asks for: the size of the data set and which of its rows these are."""
    return pyro.plate("data", N, subsample=rows)


STYLES = {
    "len": lambda x, rows: pyro.plate("data", len(x)),
    "subsample_size": lambda x, rows: pyro.plate("data", N, subsample_size=len(x)),
    "subsample": by_rows,
    "dim": lambda x, rows: pyro.plate("data", len(x), dim=-1),
    "no size": lambda x, rows: pyro.plate("data"),
}
ELBOS = {
    "Trace": Trace_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": partial(TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False),
    "particles": partial(Trace_ELBO, num_particles=2),
    "vectorised": partial(
        Trace_ELBO, num_particles=2, vectorize_particles=True, max_plate_nesting=1
    ),
}


def batch():
    return tuple(column[ROWS] for column in mixed_rows(N))


@pytest.mark.parametrize("elbo", ELBOS)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("latents", [("global",), ("local",), ("global", "local")])
def test_loss_and_gradients_equal_pyros(latents, style, elbo):
    model, guide = MixedModel(STYLES[style], latents), MixedGuide(STYLES[style], latents)
    theirs = with_plate(model, by_rows), with_plate(guide, by_rows)
    assert_equal_to_pyro(ELBOS[elbo], (model, guide), theirs, batch(), N)


# Pyro compares the plates of model and guide by their subsamples; one of no size has none.
@pytest.mark.filterwarnings("ignore:Found plate statements in guide but not model")
@pytest.mark.parametrize("guide_style", STYLES)
@pytest.mark.parametrize("model_style", STYLES)
def test_model_and_guide_may_write_the_plate_differently(model_style, guide_style):
    # Without the package a guide plate of size B beside a model plate of size N is silently wrong.
    model, guide = MixedModel(STYLES[model_style]), MixedGuide(STYLES[guide_style])
    theirs = with_plate(model, by_rows), with_plate(guide, by_rows)
    assert_equal_to_pyro(TraceMeanField_ELBO, (model, guide), theirs, batch(), N)


class Sequential(nn.Module):
    """A model, or its guide, that visits the rows one by one."""

    def __init__(self, plate, guides):
        super().__init__()
        self.plate, self.guides = plate, guides
        self.weight = nn.Parameter(torch.tensor(0.4))

    def forward(self, x, y, noise, rows):
        mu = pyro.sample("mu", dist.Normal(self.weight if self.guides else 0.0, 0.5))
        for place, row in enumerate(self.plate(x, rows)):
            # With its rows given, a sequential plate counts in the data set; else in the batch.
            at = place if self.plate is by_rows else row
            loc = mu + self.weight * x[at]
            if self.guides:
                pyro.sample(f"z_{place}", dist.Normal(self.weight * y[at], 0.3))
            else:
                z = pyro.sample(f"z_{place}", dist.Normal(loc, 1.0))
                pyro.sample(f"y_{place}", dist.Normal(z, 0.6), obs=y[at])


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
@pytest.mark.parametrize("style", ["len", "subsample_size", "subsample"])
def test_sequential_plate(style, elbo):
    if elbo is TraceEnum_ELBO:
        # With the nesting given it has no need to guess it, which draws noise.
        elbo = partial(elbo, strict_enumeration_warning=False, max_plate_nesting=0)
    model, guide = Sequential(STYLES[style], False), Sequential(STYLES[style], True)
    theirs = with_plate(model, by_rows), with_plate(guide, by_rows)
    assert_equal_to_pyro(elbo, (model, guide), theirs, batch(), N)


class Table(nn.Module):
    """Rows by columns, each with a latent effect; the column plate is itself subsampled."""

    def __init__(self, plate, data_outside, guides):
        super().__init__()
        self.plate, self.data_outside, self.guides = plate, data_outside, guides
        self.weight = nn.Parameter(torch.tensor(0.4))

    def forward(self, y, rows):
        data = self.plate(y, rows)
        columns = pyro.plate("columns", 6, subsample=torch.tensor([0, 2, 5]), dim=-1)
        with columns:
            effect = pyro.sample("effect", dist.Normal(self.weight, 0.5))
        outer, inner = (data, columns) if self.data_outside else (columns, data)
        with outer, inner:
            fn = dist.Normal(effect + self.weight, 0.6)
            if self.guides:
                pyro.sample("cell", dist.Normal(self.weight * y, 0.6))
            else:
                pyro.sample("y", dist.Normal(pyro.sample("cell", fn), 0.3), obs=y)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("data_outside", [True, False])
@pytest.mark.parametrize("style", ["len", "subsample_size", "subsample"])
def test_plate_nested_around_and_within_another(style, data_outside, elbo):
    styles = {
        "len": lambda y, rows: pyro.plate("data", len(y), dim=-2),
        "subsample_size": lambda y, rows: pyro.plate("data", N, subsample_size=len(y), dim=-2),
        "subsample": lambda y, rows: pyro.plate("data", N, subsample=rows, dim=-2),
    }
    parts = [Table(styles[style], data_outside, guides) for guides in (False, True)]
    theirs = [with_plate(part, styles["subsample"]) for part in parts]
    y = torch.linspace(-1, 2, 12).reshape(4, 3)
    assert_equal_to_pyro(elbo, parts, theirs, (y, ROWS), N)


def test_autoguide_of_global_latents():
    model = MixedModel(STYLES["len"], ("global",))
    svi = PyroSVIModule(model, AutoNormal, dataset_size=N)
    svi.loss(batch())
    torch.manual_seed(3)
    loss = svi.loss(batch())
    torch.manual_seed(3)
    with pyro.settings.context(module_local_params=True):
        expected = Trace_ELBO().differentiable_loss(with_plate(model, by_rows), svi.guide, *batch())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def log_normal(x):
    return float((-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum())


def no_guide(x):
    """For a model without latents."""


@pytest.mark.parametrize(
    ("handler", "factor"),
    [(nullcontext(), 1.0), (pyro.poutine.scale(scale=0.25), 0.25)],
    ids=["plain", "poutine.scale"],
)
def test_closed_form_with_factors_and_a_hand_written_scale(handler, factor):
    def model(x):
        pyro.factor("outside", torch.tensor(-3.0))
        with pyro.plate("data", len(x)), handler:
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
            pyro.factor("inside", 0.1 * x)
        pyro.deterministic("mean", x.mean())

    x = torch.linspace(-1, 2, 4)
    expected = -(-3.0 + factor * N / 4 * (log_normal(x) + 0.1 * float(x.sum())))
    svi = PyroSVIModule(model, no_guide, dataset_size=N)
    assert float(svi.loss(x)) == pytest.approx(expected, rel=1e-12)


def test_full_batch_is_not_scaled():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    x = torch.linspace(-1, 2, 4)
    loss = PyroSVIModule(model, no_guide, dataset_size=4).loss(x)
    assert float(loss) == pytest.approx(-log_normal(x), rel=1e-12)


@pytest.mark.parametrize("style", ["subsample_size", "subsample"])
def test_no_step_draws_a_permutation_of_the_data_set(style):
    # 10^12 rows: Pyro's own randperm(N) would ask for 8 TB.
    size = 10**12

    def plate(x, rows):
        given = {"subsample": rows} if style == "subsample" else {"subsample_size": len(x)}
        return pyro.plate("data", size, **given)

    model, guide = MixedModel(plate), MixedGuide(plate)
    svi = PyroSVIModule(model, guide, dataset_size=size)
    svi.loss(batch())
    theirs = (
        with_plate(p, lambda x, rows: pyro.plate("data", size, subsample=rows))
        for p in (model, guide)
    )
    torch.manual_seed(3)
    loss = svi.loss(batch())
    torch.manual_seed(3)
    expected = Trace_ELBO().differentiable_loss(*theirs, *batch())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


@no_validation
def test_training_loss_of_equal_batches_is_exactly_pyros():
    model, guide = MixedModel(STYLES["len"]), MixedGuide(STYLES["len"])
    svi = PyroSVIModule(model, guide, optimizer=partial(torch.optim.SGD, lr=0.0))
    steps = StepLosses()
    loader = DataLoader(TensorDataset(*mixed_rows(N)), batch_size=10, shuffle=True)
    quiet_trainer(max_epochs=1, callbacks=[steps]).fit(svi, loader)
    assert len(steps.losses) == 5
    theirs = with_plate(model, by_rows), with_plate(guide, by_rows)
    for rows, loss in zip(steps.batches, steps.losses, strict=True):
        torch.manual_seed(steps.seed)
        assert torch.equal(loss, Trace_ELBO().differentiable_loss(*theirs, *rows).detach())
