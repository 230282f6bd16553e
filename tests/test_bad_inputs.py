"""Whatever is passed to the public API: the right result, or an error that names the cause.

Each example draws one argument, right or wrong. An error must be of a class that users are told to
expect, and its message must name the argument, the element of the batch or the site. A result must
be that of a closed form. About 1,300 examples, the same each time.
"""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.utils.data import DataLoader

from pyro_lightning import (
    ArrayDataModule,
    DataPlateMessenger,
    IndexedBatch,
    IndexedDataset,
    PyroSVIModule,
    RowAdam,
    RowAdamW,
    batch_weight,
    dataset_size_of,
    mean_batch_size,
    negative_elbo,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Encountered NaN"),
    # Of torch, where it reads what is no sequence of numbers.
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays"),
]


def examples(count):
    """The same examples each time, as many as said."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# What Python raises in a model or data set keeps its class.
FOREIGN = (IndexError, ArithmeticError)


def result_or_named(run, *names):
    """Run; returns the result in a list, or None after an error that names one of ``names``."""
    try:
        return [run()]
    except (ValueError, TypeError, RuntimeError, UserWarning, *FOREIGN) as error:
        told = str(error)
        assert any(name in told for name in names), f"{type(error).__name__}: {told}"
        return None


class Anything:
    def __repr__(self):
        return "Anything()"


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**12, 2**63, -(2**70)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text("dataxy ", max_size=4),
    st.binary(max_size=2),
    st.sampled_from([2 + 1j, Anything(), Anything, len, ..., range(3), slice(1)]),
)
ARRAYS = st.sampled_from(
    [
        np.float64(3.0),
        np.int32(7),
        np.array([1.0, 2.0]),
        np.array(["a"]),
        torch.tensor(3),
        torch.tensor(2.5),
        torch.tensor(True),
        torch.tensor([1.0, float("nan")]),
        torch.zeros(0),
        torch.tensor([1j]),
    ]
)
KEYS = st.one_of(st.text("dataxy", max_size=4), st.integers(0, 3))
JUNK = st.recursive(
    st.one_of(SCALARS, ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(KEYS, inner, max_size=2),
    ),
    max_leaves=4,
)


def is_whole(value):
    """Whether a value is what a count may be, and the count."""
    if isinstance(value, torch.Tensor | np.generic) and value.ndim == 0:
        value = value.item()
    return type(value) in (int, float) and float(value).is_integer()


# -- the module ------------------------------------------------------------------------------------

N, B, AT = 20, 6, 0.3
X = torch.linspace(-1.0, 2.0, B)
HALF_LOG = 0.5 * math.log(2 * math.pi)
POINT = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(AT))


def columns(x, y):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(weight * x, 1.0), obs=y)


def closed_loss(x, y, size):
    """The loss at a weight of AT: the negative log joint, with the rows counted as ``size``."""
    x, y = torch.as_tensor(x).double(), torch.as_tensor(y).double()
    each = -0.5 * (y - AT * x) ** 2 - HALF_LOG
    assert each.numel() == len(each)  # one term a row
    return 0.5 * AT**2 + HALF_LOG - size * float(each.mean())


def module(**options):
    return PyroSVIModule(columns, **{"guide": POINT, "dataset_size": N, **options})


# What is right, or nearly, is drawn as often as what is not.
ARGUMENTS = {
    "data_plate": st.sampled_from(["data", ("data", "typo"), {"data": N}, {"data": None}]),
    "scale_sites": st.sampled_from(["y", ("y",), "typo", ["y", "y"]]),
    "dataset_size": st.one_of(st.integers(B, 50), st.integers(B, 50).map(float)),
    "checks": st.booleans(),
    "compile": st.sampled_from([False, {"backend": "eager"}]),
    "steps_per_batch": st.integers(1, 4),
    "bad_batches": st.sampled_from(["raise", "skip"]),
    "elbo": st.just(Trace_ELBO()),
    "optimizer": st.sampled_from([torch.optim.SGD, partial(torch.optim.Adam, lr=-1), len]),
    "lr_scheduler": st.sampled_from(
        [partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9), len, lambda optimizer: 3]
    ),
    "model": st.sampled_from([columns, torch.nn.Linear]),
    "guide": st.sampled_from([POINT, AutoDelta, columns, int]),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_arguments_of_the_module(argument):
    @examples(25)
    @given(st.one_of(ARGUMENTS[argument], JUNK))
    def holds(value):
        def run():
            pyro.set_rng_seed(0)
            svi = PyroSVIModule(
                **{"model": columns, "guide": POINT, "dataset_size": N, argument: value}
            )
            loss = svi.loss((X, X)).item()
            svi.configure_optimizers()
            return svi, loss

        # A function that is no guide lacks the latents; one that is no model, the observations.
        also = {"guide": "'weight'", "model": "observed site", "dataset_size": "N = "}
        found = result_or_named(run, argument, also.get(argument, argument))
        if found is None:
            return
        svi, loss = found[0]
        size = int(value) if argument == "dataset_size" else N
        assert svi.dataset_size == size
        if argument != "guide" or value is POINT:  # another guide starts elsewhere
            assert loss == pytest.approx(closed_loss(X, X, size), rel=1e-5)

    holds()


# -- batches ---------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
SHAPES = [(B,), (B,), (B, 1), (1, B), (B, 2), (B, B), (), (0,), (B - 1,), (1,), (1, 1), (N + 1,)]


@st.composite
def tensors(draw):
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES + [torch.complex64]))
    tensor = torch.linspace(0.0, 2.0, max(math.prod(shape), 1))[: math.prod(shape)]
    bad = draw(st.sampled_from([None, None, float("nan"), float("inf"), -float("inf"), 1e30]))
    if bad is not None and tensor.numel():
        tensor[draw(st.integers(0, tensor.numel() - 1))] = bad
    if bad is not None and not dtype.is_floating_point:
        dtype = torch.float32
    return tensor.reshape(shape).to(dtype)


ELEMENTS = st.one_of(tensors(), tensors(), tensors(), JUNK)
BATCHES = st.one_of(
    st.tuples(ELEMENTS, ELEMENTS),
    st.tuples(ELEMENTS, ELEMENTS),
    st.lists(ELEMENTS, max_size=3),
    st.fixed_dictionaries({"x": ELEMENTS, "y": ELEMENTS}),
    st.dictionaries(st.sampled_from(["x", "y", "z"]), ELEMENTS, max_size=3),
    st.tuples(st.tuples(ELEMENTS, ELEMENTS)),
    st.tuples(ELEMENTS, ELEMENTS).map(lambda data: IndexedBatch(data, torch.arange(B))),
    tensors(),
    JUNK,
)


def elements(batch):
    batch = batch.data if isinstance(batch, IndexedBatch) else batch
    return (batch["x"], batch["y"]) if isinstance(batch, dict) else tuple(batch)


@pytest.mark.parametrize("warmed", [False, True])
@pytest.mark.parametrize("validation", [False, True])
def test_batches(warmed, validation):
    @examples(60)
    @given(BATCHES)
    def holds(batch):
        svi = module()
        with pyro.validation_enabled(validation):
            if warmed:
                svi.loss((X, X))
            found = result_or_named(
                lambda: svi.loss(batch).item(), "batch", "site", "argument", "row numbers"
            )
            if found is not None:
                assert found[0] == pytest.approx(closed_loss(*elements(batch), N), rel=1e-3)
            if warmed:  # and the module is as it was
                assert svi.loss((X, X)).item() == pytest.approx(closed_loss(X, X, N), rel=1e-5)

    holds()


@pytest.mark.parametrize("method", ["num_rows", "scale_factor", "batch_weight", "site_table"])
def test_what_is_asked_of_batches(method):
    svi = module()
    svi.loss((X, X))

    @examples(20)
    @given(BATCHES)
    def holds(batch):
        found = result_or_named(lambda: getattr(svi, method)(batch), "batch", "site")
        if found is None or method == "site_table":
            return
        sizes = {len(t) for t in leaves(batch) if t.dim()}
        assert len(sizes) == 1
        rows = sizes.pop()
        expected = {"num_rows": rows, "scale_factor": N / rows, "batch_weight": 1.0}[method]
        assert found[0] == pytest.approx(expected)

    holds()


def leaves(value):
    if isinstance(value, IndexedBatch):
        value = value.data
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in leaves(each)] if isinstance(value, tuple | list) else []


# -- rows and draws --------------------------------------------------------------------------------


def effects(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_rows():
    """A module whose guide has the row's own number for each of B rows."""
    guide = partial(AutoNormal, init_loc_fn=lambda site: torch.zeros(site["fn"].shape()))
    svi = PyroSVIModule(effects, guide, dataset_size=B)
    svi.loss(IndexedBatch(X, torch.arange(B)))
    with torch.no_grad():
        svi.guide.locs.z.copy_(torch.arange(B) * 10.0)
        for scale in svi.guide.scales.parameters():
            scale.fill_(-20.0)
    return svi


ROWS = st.one_of(
    JUNK,
    st.lists(st.integers(-1, B), max_size=4),
    st.lists(st.booleans(), min_size=B, max_size=B),
    st.lists(st.integers(0, B - 1), min_size=1, max_size=3).map(torch.tensor),
    st.builds(slice, st.integers(-7, 7), st.integers(-7, 7), st.sampled_from([None, 1, -1, 2, 0])),
    st.sampled_from([["0"], [None], [0.5], [[0]], torch.tensor([0.0]), np.arange(B) > 2]),
)


def test_rows_to_draw():
    svi = of_rows()

    @examples(60)
    @given(ROWS)
    def holds(rows):
        found = result_or_named(lambda: svi.posterior_samples(2, rows=rows), "row")
        if found is None or rows is None:
            return
        wanted = np.arange(B)[rows if isinstance(rows, slice) else np.asarray(rows)]
        draws = found[0]["z"]
        assert draws.shape == (2, len(wanted))
        # A standard deviation of softplus(-20) = 2e-9.
        assert draws[0].tolist() == pytest.approx((wanted * 10.0).tolist(), abs=1e-5)

    holds()


def test_row_numbers_of_a_batch():
    svi = of_rows()

    @examples(40)
    @given(st.one_of(ROWS, st.permutations(range(B)), st.lists(st.integers(-1, B), min_size=B)))
    def holds(rows):
        found = result_or_named(lambda: svi.loss(IndexedBatch(X, rows)).item(), "row numbers")
        if found is None:
            return
        z = torch.as_tensor(rows).double() * 10.0
        expected = torch.distributions.Normal(z, 1.0).log_prob(X.double()).sum()
        expected = expected + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum() - HALF_LOG
        # The entropy of the guide's latents of almost no width: log of the density at its peak.
        width = math.log(torch.nn.functional.softplus(torch.tensor(-20.0).double()))
        draws = B + 1
        entropy = draws * (width + HALF_LOG)
        # Each draw is its own noise, of which half a square is in the density.
        assert found[0] == pytest.approx(-float(expected) - entropy, abs=2 * draws)

    holds()


def test_number_of_draws():
    svi = of_rows()

    @examples(25)
    @given(st.one_of(JUNK, st.integers(-1, 30)))
    def holds(count):
        if is_whole(count) and int(count) > 10**6:
            return  # right, and more than memory holds
        found = result_or_named(lambda: svi.posterior_samples(count), "num_samples")
        if found is not None:
            assert found[0]["mu"].shape == (int(count),)

    holds()


# -- data ------------------------------------------------------------------------------------------

ROWS_OF_DATA = 10
DATA = torch.arange(float(ROWS_OF_DATA))
OF_DATA = {
    "arrays": st.sampled_from([DATA.numpy(), DATA.to_sparse(), np.ma.array(np.ones(3)), DATA[:0]]),
    "batch_size": st.integers(1, 12),
    "val_split": st.floats(-0.5, 1.5),
    "test_split": st.floats(-0.5, 1.5),
    "val": st.sampled_from([DATA[:3], (DATA, DATA[:2]), {}]),
    "test": st.sampled_from([DATA[:3], [], np.array(["a"])]),
    "predict": st.sampled_from([DATA[:3], torch.tensor(1.0)]),
    "shuffle": st.sampled_from([True, False, "blocks", "rows", 1]),
    "seed": st.integers(-2, 5),
    "pin_memory": st.sampled_from([None, False, 0]),
    "device": st.sampled_from([None, "cpu", "auto", "gpu:x", 0]),
    "drop_last": st.booleans(),
}


@pytest.mark.parametrize("argument", OF_DATA)
def test_arguments_of_arrays(argument):
    @examples(15)
    @given(st.one_of(OF_DATA[argument], JUNK))
    def holds(value):
        if argument == "pin_memory" and value is True:
            return  # warns where there is no GPU

        def run():
            data = ArrayDataModule(**{"arrays": DATA, "batch_size": 4, argument: value})
            batches = [leaves(batch) for batch in data.train_dataloader()]
            return data, [torch.cat(column) for column in zip(*batches, strict=True)]

        what = "array" if argument in ("arrays", "val", "test", "predict") else argument
        found = result_or_named(run, what, argument, "the splits leave")
        if found is None:
            return
        data, found_columns = found[0]
        if argument == "arrays":
            for column, array in zip(found_columns, arrays_in(value), strict=True):
                # As text, in which NaN equals NaN.
                assert sorted(map(str, column.tolist())) == sorted(map(str, array.tolist()))
            return
        (rows,) = found_columns
        held_out = round(float(value) * ROWS_OF_DATA) if argument.endswith("_split") else 0
        assert data.dataset_size == ROWS_OF_DATA - held_out
        size = int(value) if argument == "batch_size" else 4
        dropped = data.dataset_size % size if argument == "drop_last" and value else 0
        assert len(rows) == len(set(rows.tolist())) == data.dataset_size - dropped
        assert set(rows.tolist()) <= set(DATA.tolist())

    holds()


def arrays_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    return list(value) if isinstance(value, tuple | list) else [value]


def test_data_sets_to_number():
    lists = st.lists(st.floats(-1, 1), min_size=1)

    @examples(30)
    @given(st.one_of(JUNK, lists, st.sampled_from([DATA, X.numpy()])))
    def holds(dataset):
        found = result_or_named(lambda: IndexedDataset(dataset), "__len__ and __getitem__")
        if found is not None:
            assert [item.rows for item in map(found[0].__getitem__, range(len(dataset)))] == list(
                range(len(dataset))
            )

    holds()


def test_indices_of_a_numbered_data_set():
    data = IndexedDataset(DATA)

    @examples(30)
    @given(st.one_of(JUNK, st.integers(-12, 12)))
    def holds(index):
        found = result_or_named(lambda: data[index], "index", "row")
        if found is not None:
            assert float(found[0].data) == found[0].rows == range(ROWS_OF_DATA)[index]

    holds()


# -- parts for a loop of one's own -----------------------------------------------------------------


def rows_only(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


OF_LOSS = {
    "elbo": st.just(Trace_ELBO()),
    "model": st.just(rows_only),
    "guide": st.just(lambda x: None),
    "args": st.tuples(tensors()),
    "kwargs": st.just({}),
    "plates": st.dictionaries(st.sampled_from(["data", "b"]), st.integers(-1, 30), max_size=2),
    "batch_size": st.integers(-1, 8),
    "scale_sites": st.dictionaries(st.sampled_from(["x", "b"]), st.integers(-1, 30), max_size=2),
}


@pytest.mark.parametrize("argument", OF_LOSS)
def test_arguments_of_negative_elbo(argument):
    @examples(15)
    @given(st.one_of(OF_LOSS[argument], JUNK))
    def holds(value):
        given_ = {
            "elbo": Trace_ELBO(),
            "model": rows_only,
            "guide": lambda x: None,
            "args": (X,),
            "kwargs": {},
            "plates": {"data": N},
            "batch_size": B,
            argument: value,
        }
        names = {"batch_size": ["B = "], "plates": ["plate"], "model": ["observed site"]}
        names["args"] = ["batch", "site", "plate"]
        names["kwargs"] = ["batch"]
        names["guide"] = ["guide", "batch"]

        def run():
            positional = [given_.pop(name) for name in ("elbo", "model", "guide", "args", "kwargs")]
            return negative_elbo(*positional, **given_).item()

        found = result_or_named(run, argument, *names.get(argument, []))
        if found is None:
            return
        (x,) = value if argument == "args" else (X,)
        size = value.get("data") if argument == "plates" else N
        each = 0.5 * torch.as_tensor(x).double() ** 2 + HALF_LOG
        assert each.dim() == 1
        scale = 1.0 if size is None else size / B
        assert found[0] == pytest.approx(scale * float(each.sum()), rel=1e-3)

    holds()


@pytest.mark.parametrize("argument", ["plates", "batch_size", "scale_sites", "columns"])
def test_arguments_of_the_handler(argument):
    @examples(15)
    @given(JUNK)
    def holds(value):
        def run():
            usual = {"plates": {"data": N}, "batch_size": B}
            handler = DataPlateMessenger(**{**usual, argument: value})
            with pyro.poutine.trace() as trace, handler:
                rows_only(X)
            return trace.trace.nodes["x"]["scale"]

        found = result_or_named(run, argument, "B = ")
        if found is None:
            return
        if argument == "plates":
            assert found[0] == (value["data"] / B if "data" in value else 1)
        elif argument != "columns":
            assert found[0] == N / B

    holds()


def test_weights_of_batches():
    @examples(30)
    @given(st.one_of(JUNK, st.integers(1, 30)), st.one_of(JUNK, st.floats(0.1, 30)))
    def holds(size, mean):
        found = result_or_named(lambda: batch_weight(size, mean), "batch_size")
        if found is not None:
            assert found[0] == pytest.approx(1.0 if mean is None else int(size) / float(mean))

    holds()


def test_sizes_of_loaders():
    @examples(25)
    @given(JUNK, st.one_of(JUNK, st.integers(0, 5)))
    def holds(loader, count):
        assert result_or_named(lambda: dataset_size_of(loader), "N cannot be read") is None
        loader = DataLoader(DATA, batch_size=4)
        found = result_or_named(lambda: mean_batch_size(loader, count), "num_batches")
        if found is not None and found[0] is not None:
            assert found[0] == pytest.approx(min(ROWS_OF_DATA, float(count) * 4) / float(count))

    holds()


OPTIONS = {
    "params": JUNK,
    "lr": st.floats(-1, 1),
    "betas": st.tuples(st.floats(-0.5, 1.5), st.floats(-0.5, 1.5)),
    "eps": st.floats(-1, 1),
    "weight_decay": st.floats(-1, 1),
    "amsgrad": st.booleans(),
    "maximize": st.booleans(),
}


@pytest.mark.parametrize("argument", OPTIONS)
@pytest.mark.parametrize("kinds", [(RowAdam, torch.optim.Adam), (RowAdamW, torch.optim.AdamW)])
def test_arguments_of_row_adam(argument, kinds):
    @examples(8)
    @given(st.one_of(OPTIONS[argument], JUNK))
    def holds(value):
        values = []
        for kind in kinds:
            weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

            def run(kind=kind, weight=weight):
                optimizer = kind(**{"params": [weight], "lr": 0.1, argument: value})
                weight.square().sum().backward()
                optimizer.step()
                return weight.detach()

            also = ["parameter", "optimizer"] if argument == "params" else []
            if kind is kinds[0]:
                found = result_or_named(run, argument, *also)
                if found is None:
                    return
                values += found
            else:
                values.append(run())
        torch.testing.assert_close(*values, equal_nan=True)

    holds()
