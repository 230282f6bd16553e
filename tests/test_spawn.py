"""Strategies that start processes from the one that calls fit, and load their result back."""

import pytest
import torch
from spawn_fit import DATA, N
from support import quiet_trainer, run_script

from pyro_lightning._lightning import loses_new_parameters


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_script("spawn_fit.py", tmp_path_factory.mktemp("spawn"))


@pytest.mark.slow
def test_a_fit_that_would_lose_the_guide_is_refused_before_the_first_step(found):
    assert "no example batch can come back to make them" in found["refused"]
    assert "Call svi.loss(batch) once before the fit" in found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["ddp_spawn", "ddp_fork", "after a loss"])
def test_the_guide_comes_back_trained(found, run):
    # The untrained guide is at 0, 20 posterior sds away; steps of 0.05 leave less than one.
    exact, sd = float(DATA.sum() / (100 + N)), (100 + N) ** -0.5
    assert found["mean"][run] == pytest.approx(exact, abs=sd)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_n_comes_back_and_weights_alone_are_in_a_state_dict(found, strategy):
    assert found["size"][strategy] == N
    parameters = {"guide.locs.mu_unconstrained", "guide.scales.mu_unconstrained"}
    assert set(found["keys"][strategy]) == parameters


@pytest.mark.slow
def test_latents_of_rows_come_back(found):
    # The mode of each row is within 0.001 of its value: a prior of sd 10, and noise of 0.1. Each
    # took 40 steps of Adam at 0.2 from near 0, which leave the farthest 0.4; the values have an sd
    # of 1, so that rows in other places would be farther off.
    torch.testing.assert_close(torch.tensor(found["rows"]), DATA, rtol=0, atol=0.5)


@pytest.mark.parametrize(
    ("strategy", "lost"), [("ddp", False), ("ddp_spawn", True), ("ddp_fork", True), ("auto", False)]
)
def test_which_strategies_lose_new_parameters(strategy, lost):
    devices = 1 if strategy == "auto" else 2
    assert loses_new_parameters(quiet_trainer(strategy=strategy, devices=devices)) is lost
    assert not torch.distributed.is_initialized()
