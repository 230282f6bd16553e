"""Whatever is passed to predictions and their scores: the right numbers, or a named error.

As in ``test_bad_inputs.py``; about 700 examples, the same each time.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_bad_inputs import (
    AT,
    HALF_LOG,
    JUNK,
    POINT,
    X,
    columns,
    examples,
    is_whole,
    result_or_named,
)
from torch.utils.data import DataLoader

from pyro_lightning import (
    ArrayDataModule,
    ELBOConvergence,
    IndexedDataset,
    IntervalCoverage,
    KLAnnealing,
    LogPredictiveDensity,
    NegativeELBO,
    PITHistogram,
    PosteriorMonitor,
    Prediction,
    PyroSVIModule,
    crps,
    interval_coverage,
    log_predictive_density,
    pit_histogram,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays"),
]
S, B = 19, 3

# -- what is predicted -----------------------------------------------------------------------------

FIELDS = {
    "num_samples": st.integers(-1, 30),
    "sites": st.sampled_from([None, "y", ("y", "z"), ["y", "y"]]),
    "summary": st.sampled_from([None, "mean", 0.5, ["mean", "sd", 0.1], ["median"], [1.5], []]),
    "chunk_size": st.integers(-1, 30),
    "parallel": st.sampled_from([None, True, False]),
    "local": st.sampled_from(["guide", "prior", "model"]),
    "seed": st.integers(-2, 5),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_a_prediction(field):
    draws = torch.arange(1.0, S + 1).unsqueeze(1).expand(S, B)

    @examples(12)
    @given(st.one_of(FIELDS[field], JUNK))
    def holds(value):
        found = result_or_named(lambda: Prediction(**{field: value}), field)
        if found is None:
            return
        if field in ("num_samples", "chunk_size", "seed") and value is not None:
            assert is_whole(value) and getattr(found[0], field) == int(value)
        if found[0].summary is None:
            return
        columns = {"mean": lambda: (S + 1) / 2, "sd": lambda: math.sqrt(S * (S + 1) / 12)}
        for name, kept in zip(found[0].summary, found[0].kept(draws), strict=True):
            # A quantile p of 1, ..., S, between two of them.
            known = columns.get(name, lambda p=name: 1 + p * (S - 1))()
            torch.testing.assert_close(kept, torch.full((B,), float(known)))

    holds()


# -- scores ----------------------------------------------------------------------------------------

SHAPES = [(S, B), (S, B), (S, B), (B,), (S,), (S, B, 2), (0, B), (S, 0), (), (1, B)]
DTYPES = [torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64]


@st.composite
def tables(draw, shapes):
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from([DTYPES[1]] * 4 + DTYPES))
    values = torch.linspace(-2.0, 1.0, max(math.prod(shape), 1), dtype=torch.float64)
    values = values[: math.prod(shape)].reshape(shape)
    if values.numel() and draw(st.integers(0, 5)) == 0:
        values.view(-1)[0] = draw(st.sampled_from([math.nan, math.inf]))
    return values.to(dtype)


DRAWS = st.one_of(tables(SHAPES), tables(SHAPES), JUNK)
TARGETS = st.one_of(tables([(B,), (B,), (B,), (B, 2), (S, B), ()]), JUNK)
NAMES = "draws", "target", "observation"


def known(draws, target):
    """The parts that scores count, as NumPy arrays."""
    draws, target = (np.asarray(each).astype(float) for each in (draws, target))
    assert draws.shape[1:] == target.shape
    observed = ~np.isnan(target)
    return draws[:, observed], target[observed]


def test_draws_and_targets_of_a_histogram():
    @examples(60)
    @given(DRAWS, TARGETS)
    def holds(draws, target):
        found = result_or_named(lambda: pit_histogram(draws, target, 4), *NAMES)
        if found is None:
            return
        flat, observed = known(draws, target)
        masses = np.zeros(4)
        for column, value in zip(flat.T, observed, strict=True):
            low, high = (column < value).sum(), (column <= value).sum() + 1
            for part in range(low, high):  # in parts of 1 / (S + 1)
                edges = np.linspace(0, 1, 5)
                start, stop = part / (len(flat) + 1), (part + 1) / (len(flat) + 1)
                inside = np.clip(np.minimum(stop, edges[1:]) - np.maximum(start, edges[:-1]), 0, 1)
                masses += inside / (high - low) * (len(flat) + 1)
        if len(observed):
            assert found[0].tolist() == pytest.approx((masses / len(observed)).tolist())
        else:
            assert found[0].isnan().all()

    holds()


def test_draws_and_targets_of_a_coverage():
    @examples(60)
    @given(DRAWS, TARGETS)
    def holds(draws, target):
        found = result_or_named(lambda: interval_coverage(draws, target, 0.5), *NAMES, "level")
        if found is None:
            return
        flat, observed = known(draws, target)
        if not len(observed):
            assert all(torch.isnan(each).all() for each in found[0])
            return
        lower, upper = np.quantile(flat, [0.25, 0.75], axis=0, method="weibull")
        coverage, width = found[0]
        within = (lower - 1e-9 <= observed) & (observed <= upper + 1e-9)
        assert coverage.item() == pytest.approx(within.mean())
        assert width.item() == pytest.approx((upper - lower).mean(), nan_ok=True)

    holds()


@pytest.mark.parametrize("made", [interval_coverage, IntervalCoverage])
def test_levels(made):
    draws, target = torch.arange(1.0, S + 1).unsqueeze(1).expand(S, B), torch.tensor([1.0, 10, 19])
    given_ = (draws, target) if made is interval_coverage else ()

    @examples(25)
    @given(st.one_of(JUNK, st.floats(0, 1), st.lists(st.floats(0, 1), max_size=3)))
    def holds(levels):
        found = result_or_named(lambda: made(*given_, levels), "level")
        if found is not None:
            several = levels if isinstance(levels, list | tuple) else [levels]
            assert all(0 < float(level) < 1 for level in several)

    holds()


def test_log_likelihoods():
    @examples(40)
    @given(DRAWS)
    def holds(values):
        found = result_or_named(lambda: log_predictive_density(values), "log_likelihood")
        if found is None:
            return
        each = np.log(np.exp(np.asarray(values).astype(float)).mean(0))
        if not len(each):
            assert torch.isnan(found[0][0])
            return
        assert found[0][0].item() == pytest.approx(each.mean(), nan_ok=True, rel=1e-5)

    holds()


UPDATES = {
    "density": (LogPredictiveDensity, lambda value: (value,), "log_likelihood"),
    "coverage": (IntervalCoverage, lambda value: (value, torch.zeros(B)), "draws"),
    "histogram": (PITHistogram, lambda value: (value, torch.zeros(B)), "draws"),
    "loss": (NegativeELBO, lambda value: (value, 3), "loss_per_obs"),
    "rows": (NegativeELBO, lambda value: (torch.tensor(1.0), value), "rows"),
}


@pytest.mark.parametrize("name", UPDATES)
def test_updates_of_metrics(name):
    kind, arguments, said = UPDATES[name]

    @examples(15)
    @given(JUNK)
    def holds(value):
        assert_unchanged = kind()
        found = result_or_named(lambda: assert_unchanged.update(*arguments(value)), said)
        if found is None:
            return
        assert name in ("loss", "rows") and is_number(value)

    holds()


def is_number(value):
    return isinstance(value, int | float | np.generic | torch.Tensor) and np.ndim(value) == 0


def test_draws_and_targets_of_a_crps():
    @examples(40)
    @given(DRAWS, TARGETS)
    def holds(draws, target):
        found = result_or_named(lambda: crps(draws, target), *NAMES)
        if found is None:
            return
        flat, observed = known(draws, target)
        if not len(observed) or not (np.isfinite(flat).all() and np.isfinite(observed).all()):
            assert not math.isfinite(found[0])
            return
        between = np.abs(flat[:, None] - flat[None]).mean((0, 1))
        each = np.abs(flat - observed).mean(0) - between / 2
        assert float(found[0]) == pytest.approx(each.mean(), abs=1e-5)

    holds()


# -- log-likelihoods -------------------------------------------------------------------------------

LIKELIHOODS = {
    "data": st.sampled_from([[(X, X)], [(X, X), (X[:2], X[:2])], [], [(X, X[:2])], (X, X)]),
    "num_samples": st.integers(-1, 5),
    "posterior": st.sampled_from(
        [None, {"weight": torch.full((4,), AT)}, {"weight": torch.zeros(3)}, {"typo": X}]
    ),
    "chunk_size": st.integers(-1, 5),
    "parallel": st.sampled_from([None, True, False]),
}


@pytest.mark.parametrize("argument", LIKELIHOODS)
def test_arguments_of_log_likelihood(argument):
    svi = PyroSVIModule(columns, POINT, dataset_size=20)
    svi.loss((X, X))

    @examples(20)
    @given(st.one_of(LIKELIHOODS[argument], JUNK))
    def holds(value):
        given_ = {"data": [(X, X)], "num_samples": 4, argument: value}
        if argument == "num_samples" and is_whole(value) and value > 10**6:
            return  # right, and more than memory holds
        also = {"data": ["batch"], "posterior": ["site", "draws"]}
        found = result_or_named(
            lambda: svi.log_likelihood(given_.pop("data"), **given_),
            argument,
            *also.get(argument, []),
        )
        if found is None:
            return
        x = torch.cat([rows for rows, _ in value]) if argument == "data" else X
        count = int(value) if argument == "num_samples" else 4
        weight = value["weight"] if argument == "posterior" and value else torch.full((count,), AT)
        torch.testing.assert_close(found[0]["y"], -0.5 * (x - weight[:, None] * x) ** 2 - HALF_LOG)

    holds()


# -- callbacks -------------------------------------------------------------------------------------

CALLBACKS = [
    *((ELBOConvergence, {}, name) for name in ("r_hat", "ess", "mcse", "window", "max_tracked")),
    *((KLAnnealing, {}, name) for name in ("steps", "epochs")),
    *((KLAnnealing, {"steps": 9}, name) for name in ("start", "cycles", "ramp", "unlimited")),
    *(
        (PosteriorMonitor, {}, name)
        for name in (
            *("sites", "every_n_epochs", "every_n_steps", "num_samples"),
            *("interval", "max_entries", "figure_every"),
        )
    ),
]


@pytest.mark.parametrize(("kind", "others", "argument"), CALLBACKS)
def test_arguments_of_callbacks(kind, others, argument):
    @examples(10)
    @given(st.one_of(JUNK, st.floats(-1, 3)))
    def holds(value):
        result_or_named(lambda: kind(**{**others, argument: value}), argument, kind.__name__)

    holds()


# -- data ------------------------------------------------------------------------------------------


def test_numbers_of_workers():
    @examples(15)
    @given(st.one_of(JUNK, st.integers(-3, 2)))
    def holds(value):
        if is_whole(value) and value > 8:
            return  # right, and more than a machine has
        run = lambda: ArrayDataModule(torch.zeros(4), num_workers=value).train_dataloader()  # noqa: E731
        found = result_or_named(run, "num_workers")
        if found is not None:
            assert found[0].num_workers == int(value)

    holds()


def test_functions_that_collate():
    @examples(15)
    @given(st.one_of(JUNK, st.just(torch.stack)))
    def holds(value):
        def run():
            data = IndexedDataset(torch.arange(4.0), value)
            return next(iter(DataLoader(data, batch_size=4, collate_fn=data.collate)))

        found = result_or_named(run, "collate_fn", "callable", "argument")
        if found is not None and value in (None, torch.stack):
            assert found[0].data.tolist() == found[0].rows.tolist() == [0, 1, 2, 3]

    holds()
