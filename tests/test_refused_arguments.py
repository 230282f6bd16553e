"""Arguments of a wrong kind are an error where they are given, which says what to write."""

from functools import partial

import pyro
import pytest
import torch
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.autoguide import (
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
)
from support import no_validation, normal_mean, quiet_trainer
from torch.utils.data import DataLoader

from pyro_lightning import PyroSVIModule


def no_latents(x):
    """The guide of a model without latents."""


def observed_only(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", pyro.distributions.Normal(0.0, 1.0), obs=x)


# -- elbo ------------------------------------------------------------------------------------------


SERVED = [
    Trace_ELBO,
    TraceMeanField_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    TraceTMC_ELBO,
    EnergyDistance,
]


@pytest.mark.parametrize("elbo", SERVED)
def test_served_elbos(elbo):
    assert type(PyroSVIModule(normal_mean, elbo=elbo()).elbo) is elbo


def test_elbo_without_a_value():
    listed = ".*".join(elbo.__name__ for elbo in SERVED)
    with pytest.raises(TypeError, match=f"TraceTailAdaptive_ELBO has no value.*{listed}"):
        PyroSVIModule(normal_mean, elbo=TraceTailAdaptive_ELBO())


@pytest.mark.parametrize("elbo", [RenyiELBO, ReweightedWakeSleep])
def test_subclass_of_an_elbo_whose_code_would_not_run(elbo):
    with pytest.raises(TypeError, match=f"Mine.*{elbo.__name__}"):
        PyroSVIModule(normal_mean, elbo=type("Mine", (elbo,), {})())


@pytest.mark.parametrize(
    "elbo", [JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO]
)
def test_jit_elbo(elbo):
    plain = elbo.__name__.removeprefix("Jit")
    with pytest.raises(TypeError, match=rf"{elbo.__name__} .* use {plain}\(\).*compile=True"):
        PyroSVIModule(normal_mean, elbo=elbo())


def test_class_of_an_elbo():
    with pytest.raises(TypeError, match=r"write elbo=Trace_ELBO\(\)"):
        PyroSVIModule(normal_mean, elbo=Trace_ELBO)


def test_something_else_as_elbo():
    with pytest.raises(TypeError, match="got str"):
        PyroSVIModule(normal_mean, elbo="Trace_ELBO")


# -- optimizer -------------------------------------------------------------------------------------


def test_optimizer_of_pyro():
    with pytest.raises(TypeError, match=r"pyro\.optim.*functools\.partial\(torch\.optim\.Adam"):
        PyroSVIModule(normal_mean, optimizer=pyro.optim.Adam({"lr": 0.01}))


def test_optimizer_instance():
    made = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(TypeError, match=r"optimizer is a Adam;.*functools\.partial"):
        PyroSVIModule(normal_mean, optimizer=made)


def test_optimizer_that_cannot_be_called():
    with pytest.raises(TypeError, match="optimizer is a float"):
        PyroSVIModule(normal_mean, optimizer=0.01)


# -- model and guide -------------------------------------------------------------------------------


class WithModel(PyroSVIModule):
    def model(self, x):
        normal_mean(x)


class WithBoth(WithModel):
    def guide(self, x):
        pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))


def test_model_missing():
    with pytest.raises(TypeError, match="model must be .* or a method of your subclass"):
        PyroSVIModule()


def test_class_as_model():
    with pytest.raises(TypeError, match="model must be .*; got Linear"):
        PyroSVIModule(torch.nn.Linear)


def test_model_given_twice():
    with pytest.raises(ValueError, match="WithModel defines model: do not pass another"):
        WithModel(normal_mean)


@pytest.mark.parametrize("guide", [no_latents, partial(AutoNormal, init_scale=0.2)])
def test_guide_given_twice(guide):
    with pytest.raises(ValueError, match="WithBoth defines guide: do not pass another"):
        WithBoth(guide=guide)


@pytest.mark.parametrize("guide", [3, "AutoNormal", None])
def test_something_else_as_guide(guide):
    with pytest.raises(TypeError, match=f"guide must be .*; got {type(guide).__name__}"):
        PyroSVIModule(normal_mean, guide)


@pytest.mark.parametrize(
    "guide",
    [AutoNormalMessenger, AutoHierarchicalNormalMessenger, AutoRegressiveMessenger],
)
def test_messenger_guide(guide):
    match = f"{guide.__name__} re-runs the model .* Use AutoNormal"
    with pytest.raises(TypeError, match=match):
        PyroSVIModule(normal_mean, guide)
    with pytest.raises(TypeError, match=match):
        PyroSVIModule(normal_mean, guide(normal_mean))


# -- names and numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1])
def test_dataset_size_below_one(size):
    with pytest.raises(ValueError, match=f"dataset_size must be at least 1, got {size}"):
        PyroSVIModule(normal_mean, dataset_size=size)


@pytest.mark.parametrize("argument", ["data_plate", "scale_sites"])
def test_name_that_is_no_name(argument):
    with pytest.raises(TypeError, match=f"{argument} must be a name or names"):
        PyroSVIModule(normal_mean, **{argument: (1,)})


def test_draws_before_the_guide_has_parameters():
    with pytest.raises(RuntimeError, match=r"fit the module, or call loss\(batch\)"):
        PyroSVIModule(normal_mean, dataset_size=10).posterior_samples(3)


def test_number_of_draws_below_one():
    svi = PyroSVIModule(normal_mean, dataset_size=10)
    svi.loss(torch.zeros(4))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        svi.posterior_samples(0)


def test_whole_numbers_that_are_floats():
    svi = PyroSVIModule(normal_mean, dataset_size=1e3, steps_per_batch=2.0)
    assert (svi.dataset_size, svi.steps_per_batch) == (1000, 2)


@pytest.mark.parametrize("argument", ["dataset_size", "steps_per_batch"])
@pytest.mark.parametrize("value", ["7", 2.5, True, None, [3]])
def test_number_that_is_none(argument, value):
    if argument == "dataset_size" and value is None:
        return
    with pytest.raises(TypeError, match=f"{argument} must be a whole number, got"):
        PyroSVIModule(normal_mean, **{argument: value})


@pytest.mark.parametrize(
    ("argument", "unmet"), [("data_plate", "plates are 'data'"), ("scale_sites", "sites are")]
)
def test_name_that_the_model_does_not_have(argument, unmet):
    named = ("data", "typo") if argument == "data_plate" else "typo"
    svi = PyroSVIModule(normal_mean, dataset_size=10, **{argument: named})
    with pytest.warns(UserWarning, match=f"{argument} names 'typo', .* {unmet}"):
        svi.loss(torch.zeros(4))


def test_latent_in_a_sequential_plate_under_an_autoguide():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", pyro.distributions.Normal(0.0, 1.0))
            pyro.sample(f"x_{i}", pyro.distributions.Normal(z, 1.0), obs=x[i])

    svi = PyroSVIModule(model, dataset_size=10)
    match = "latent site 'z_0' stands in the sequential plate 'data' .*AutoNormal does not serve"
    with pytest.raises(ValueError, match=match):
        svi.loss(torch.zeros(3))


@pytest.mark.parametrize("key", [0, None])
def test_a_mapping_whose_keys_are_no_names(key):
    svi = PyroSVIModule(normal_mean, dataset_size=10)
    with pytest.raises(TypeError, match=f"its key {key} is no string.*model_inputs"):
        svi.loss({key: torch.zeros(4)})


def test_a_loss_that_is_complex():
    def model(x):
        mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.factor("term", x * mu)

    svi = PyroSVIModule(model, dataset_size=10, checks=False)
    with pytest.raises(ValueError, match="the loss is a number of torch.complex64"):
        svi.loss(torch.ones(3) * 1j)


# -- a fit that cannot start -----------------------------------------------------------------------


@no_validation
def test_nothing_to_train():
    svi = PyroSVIModule(observed_only, no_latents)
    with pytest.raises(ValueError, match="nothing to train.*Use an autoguide"):
        quiet_trainer(max_epochs=1).fit(svi, DataLoader(torch.zeros(8), batch_size=4))


@no_validation
def test_nothing_to_train_but_frozen_parameters():
    class Frozen(PyroSVIModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

        def model(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", pyro.distributions.Normal(self.loc, 1.0), obs=x)

        def guide(self, x):
            """There are no latents."""

    with pytest.raises(ValueError, match="nothing to train"):
        quiet_trainer(max_epochs=1).fit(Frozen(), DataLoader(torch.zeros(8), batch_size=4))


@no_validation
@pytest.mark.parametrize(
    ("argument", "made"), [("optimizer", "a torch optimizer"), ("lr_scheduler", "a scheduler")]
)
def test_what_is_called_returns_something_else(argument, made):
    svi = PyroSVIModule(normal_mean, **{argument: lambda given: 3})
    with pytest.raises(TypeError, match=f"{argument} must return {made}.*, got 3"):
        quiet_trainer(max_epochs=1).fit(svi, DataLoader(torch.zeros(8), batch_size=4))


@no_validation
def test_what_is_called_raises():
    svi = PyroSVIModule(normal_mean, optimizer=partial(torch.optim.Adam, lr=-1.0))
    with pytest.raises(ValueError, match=r"optimizer\(parameters\): Invalid learning rate"):
        quiet_trainer(max_epochs=1).fit(svi, DataLoader(torch.zeros(8), batch_size=4))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_before_a_fit_without_a_stated_size(stage):
    svi = PyroSVIModule(normal_mean)
    loader = DataLoader(torch.zeros(8), batch_size=4)
    with pytest.raises(ValueError, match="never taken from validation or test data.*dataset_size"):
        getattr(quiet_trainer(), stage)(svi, loader)
