"""What cannot be compiled runs eagerly, with one warning that names the cause; strict refuses."""

import itertools
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_models import B, N, values_batch
from compiled_support import AS_TRACED, is_compiled, loss_and_gradients
from support import quiet_trainer
from torch.nn.utils.rnn import pack_padded_sequence

from pyro_lightning import ArrayDataModule, PyroSVIModule


def scaled_by(scale):
    """A model whose noise is what a function of its batch returns."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0 + scale(x)), obs=x)

    return model


def by_list(x):
    return max(abs(value) for value in x.tolist())


def by_numpy(x):
    return float(np.abs(x.numpy()).max())


def by_array(x):
    return float(np.asarray(x).max() ** 2)


def by_float(x):
    return float(x.mean()) ** 2


def by_item(x):
    return abs(x.mean().item())


def by_branch(x):
    return 1.0 if x.sum() > 0 else 2.0


def by_index(x):
    return [0.1, 0.2, 0.3][int((x.sum() > 0).long())]


def by_where(x):
    return len(x[x > 0]) / 10


def by_nonzero(x):
    return len(torch.nonzero(x > 0)) / 10


def by_random(x):
    return random.random()


def by_numpy_random(x):
    return np.random.rand()


def counting():
    counts = itertools.count()
    return lambda x: next(counts) / 10


def by_list_of_calls():
    calls = []

    def scale(x):
        calls.append(None)
        return len(calls) / 10

    return scale


def by_closure():
    calls = 0

    def scale(x):
        nonlocal calls
        calls += 1
        return calls / 10

    return scale


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return self.calls / 10


def by_generator():
    generator = np.random.default_rng(0)
    return lambda x: generator.random()


def by_seed_of_torch(x):
    generator = torch.Generator().manual_seed(int(1000 * abs(float(x[0]))))
    return torch.rand((), generator=generator)


def by_tensor_of_tensors(x):
    return torch.tensor([x[0], x[1]]).square().sum()


def by_repr(x):
    return len(repr(x)) / 100


def by_split(x):
    return len(torch.tensor_split(x, (x > 0).sum().reshape(1))[0]) / 10


def by_packing(x):
    lengths = (x[:1] > 0).long() + 1
    return pack_padded_sequence(x[:2, None], lengths).data.sum().square()


def by_dlpack(x):
    return float(np.from_dlpack(x).max()) ** 2


def by_own_random():
    generator = random.Random(0)
    return lambda x: generator.random()


def by_generator_function():
    numbers = (number / 10 for number in range(1000))
    return lambda x: next(numbers)


HERE = r"test_compiled_fallbacks\.py:\d+"
FALLBACKS = {
    "tolist": (lambda: by_list, rf"Tensor\.tolist\(\) of a tensor that depends on .*{HERE}"),
    "numpy": (lambda: by_numpy, rf"Tensor\.numpy\(\) of a tensor.*{HERE}"),
    "asarray": (lambda: by_array, rf"Tensor\.__array__\(\) of a tensor.*{HERE}"),
    "float": (lambda: by_float, rf"Tensor\.__float__\(\) of a tensor.*{HERE}"),
    "if": (lambda: by_branch, rf"Tensor\.__bool__\(\) of a tensor.*{HERE}"),
    "index": (lambda: by_index, rf"Tensor\.__int__\(\) of a tensor.*{HERE}"),
    "nonzero": (lambda: by_nonzero, r"aten\.nonzero.* makes a tensor whose size depends on"),
    "mask": (lambda: by_where, r"aten\.index\.Tensor makes a tensor whose size depends on"),
    "random": (lambda: by_random, "draws from Python's or NumPy's random numbers"),
    "numpy.random": (lambda: by_numpy_random, "draws from Python's or NumPy's random numbers"),
    "tensor of tensors": (lambda: by_tensor_of_tensors, r"tensor\(\) reads values of a tensor"),
    "repr": (lambda: by_repr, r"Tensor\.__repr__\(\) of a tensor"),
    "split": (lambda: by_split, r"tensor_split\(\) reads values of a tensor"),
    "packed": (lambda: by_packing, r"_pack_padded_sequence\(\) reads values of a tensor"),
    "dlpack": (lambda: by_dlpack, r"Tensor\.__dlpack__\(\) of a tensor"),
    "random.Random": (by_own_random, "the model changes 'random numbers of generator'"),
    "generator": (by_generator_function, "the model changes 'the iterator numbers' as it runs"),
    "count": (counting, "the model changes 'the iterator counts' as it runs"),
    "list": (by_list_of_calls, r"the model changes 'len\(calls\)' as it runs"),
    "closure": (by_closure, r"the model changes '.*calls' as it runs"),
    "attribute": (Counter, r"the model changes 'scale\.calls' as it runs"),
    "numpy.Generator": (by_generator, "the model changes 'random numbers of generator' as it runs"),
    "torch.Generator": (lambda: by_seed_of_torch, r"Tensor\.__float__\(\) of a tensor"),
}


def made(scale, **options):
    torch.manual_seed(0)
    return PyroSVIModule(scaled_by(scale), dataset_size=N, checks=False, **options)


def fits(svi, steps=4):
    found = []
    for step in range(steps):
        random.seed(step)
        np.random.seed(step)
        found.append(loss_and_gradients(svi, values_batch(step), step)[0])
    return torch.stack(found)


@pytest.mark.parametrize("name", FALLBACKS)
def test_falls_back_with_one_warning_that_names_the_cause(name):
    make_scale, cause = FALLBACKS[name]
    svi = made(make_scale(), compile=AS_TRACED)
    with pytest.warns(UserWarning, match=f"(?s){cause}") as caught:
        fits(svi)
    assert len(caught) == 1
    assert not is_compiled(svi)


@pytest.mark.parametrize("name", FALLBACKS)
def test_strict_refuses_what_falls_back(name):
    make_scale, cause = FALLBACKS[name]
    with pytest.raises(RuntimeError, match=f"(?s)cannot be compiled: .*({cause})"):
        fits(made(make_scale(), compile="strict"))


# The others keep a state of their own, in which the runs of tracing and comparing leave a trace.
STATELESS = [
    "repr",
    "split",
    "tolist",
    "numpy",
    "asarray",
    "float",
    "if",
    "index",
    "mask",
    "random",
    "numpy.random",
]


@pytest.mark.parametrize("name", STATELESS)
def test_what_falls_back_equals_eager(name):
    scale = FALLBACKS[name][0]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fits(made(scale, compile=AS_TRACED), 6)
    assert torch.equal(found, fits(made(scale), 6))


# A trace puts generators back, and runs nothing that draws from an iterator.
@pytest.mark.parametrize("name", ["count", "generator", "random.Random", "numpy.Generator"])
def test_what_draws_from_its_own_source_equals_eager(name):
    found = []
    for options in ({"compile": AS_TRACED}, {}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(fits(made(FALLBACKS[name][0](), **options), 6))
    assert torch.equal(*found)


def test_an_item_is_followed():
    # Pyro's own code adds up such items, so that they stay tensors in a trace.
    svi, eager = made(by_item, compile=AS_TRACED), made(by_item)
    torch.testing.assert_close(fits(svi), fits(eager), rtol=1e-6, atol=0)
    assert is_compiled(svi)


def test_values_that_a_hook_reads_before_the_trace_are_followed():
    class Hooked(PyroSVIModule):
        """Takes its scale from the last batch, by NumPy."""

        scale = 1.0

        def on_train_batch_start(self, batch, batch_idx):
            self.scale = 1.0 + float(np.abs(batch.numpy()).max())

        def model(self, x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, self.scale), obs=x)

    found = []
    for options in ({"compile": AS_TRACED}, {}):
        torch.manual_seed(0)
        svi = Hooked(**options)
        data = ArrayDataModule(values_batch(0, rows=N)[0], batch_size=B)
        quiet_trainer(max_epochs=6).fit(svi, datamodule=data)
        found.append(torch.stack([p.detach() for p in svi.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_arguments_that_a_hook_computes_are_followed(steps):
    class Annealed(PyroSVIModule):
        """Its third argument is another number at each step."""

        calls = 0

        def model_inputs(self, batch):
            self.calls = 1 + (getattr(self.trainer, "global_step", 0)) % 7
            return (batch, 0.1 * self.calls), {}

        def model(self, x, weight):
            with pyro.poutine.scale(scale=weight):
                mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    found = []
    for options in ({"compile": AS_TRACED, "steps_per_batch": steps}, {"steps_per_batch": steps}):
        torch.manual_seed(0)
        svi = Annealed(checks=False, **options)
        data = ArrayDataModule(values_batch(0, rows=N)[0], batch_size=4)
        quiet_trainer(max_epochs=40).fit(svi, datamodule=data)
        found.append(torch.stack([p.detach() for p in svi.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("container", [list, tuple])
def test_a_number_of_the_batch_is_followed(container):
    def model(x, count):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            for at in range(count):
                pyro.sample(f"x_{at}", dist.Normal(mu, 1.0 + at), obs=x)

    svi, eager = (
        PyroSVIModule(model, dataset_size=N, **options) for options in ({"compile": AS_TRACED}, {})
    )
    for step in range(70):
        batch = container([*values_batch(step), 1 + step % 3])
        loss, wanted = (loss_and_gradients(each, batch, step)[0] for each in (svi, eager))
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert svi._compiled.compilations == 3


def test_a_batch_of_something_else_than_tensors_is_eager():
    class Rows:
        def __init__(self, x):
            self.x = x

    class Own(PyroSVIModule):
        def num_rows(self, batch):
            return len(batch.x)

        def model(self, batch):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(batch.x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=batch.x)

    svi = Own(dataset_size=N, compile=True)
    with pytest.warns(UserWarning, match=r"\[0\]\[0\] holds a Rows, which is no tensor"):
        svi.loss(Rows(*values_batch(0)))


@pytest.mark.parametrize("compile", ["yes", 1, None])
def test_refuses_other_arguments(compile):
    with pytest.raises(TypeError, match="compile must be False, True, 'strict' or a dict"):
        PyroSVIModule(scaled_by(by_float), compile=compile)


def test_errors_of_the_first_batch_are_those_of_eager():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    messages = []
    for options in ({"compile": "strict"}, {"compile": True}, {}):
        svi = PyroSVIModule(model, dataset_size=N, **options)
        with pytest.raises(ValueError, match="no observed site") as caught:
            svi.loss(values_batch(0))
        messages.append(str(caught.value))
    assert len(set(messages)) == 1


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("draw", [torch.rand_like, lambda x: x * random.random()])
def test_arguments_that_are_drawn_are_eager_and_the_same(draw, steps):
    class Augmented(PyroSVIModule):
        def model_inputs(self, batch):
            return (batch + 0.1 * draw(batch),), {}

        def model(self, x):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    found = []
    for options in ({"compile": AS_TRACED, "steps_per_batch": steps}, {}):
        torch.manual_seed(0)
        random.seed(0)
        svi = Augmented(**options)
        data = ArrayDataModule(values_batch(0, rows=N)[0], batch_size=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(max_epochs=2).fit(svi, datamodule=data)
        told = [each for each in caught if "draws random numbers" in str(each.message)]
        assert len(told) == bool(options)
        found.append(torch.stack([p.detach() for p in svi.parameters()]))
    assert torch.equal(*found)
