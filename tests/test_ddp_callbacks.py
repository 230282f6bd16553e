"""Callbacks on two processes: one weight of the KL, one end, one log."""

import pytest
from annealing_support import linear
from support import run_script


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_script("ddp_callbacks_fit.py", tmp_path_factory.mktemp("callbacks"))


def test_the_kl_has_the_same_weight_on_both(found):
    first, second = found["weights"]
    assert first == second == pytest.approx([linear(step, 7) for step in range(12)])


def test_the_mean_of_their_losses_is_the_annealed_one_of_both_batches(found):
    first, second = found["losses"]
    for one, two, expected in zip(first, second, found["expected"], strict=True):
        assert (one + two) / 2 == pytest.approx(expected, rel=1e-5)


def test_both_stop_at_one_step_with_one_mean(found):
    assert found["converged"]
    first, second = found["ends"]
    assert first == second
    assert first[1] < 1000
    first, second = found["means"]
    assert first == second


def test_the_posterior_is_logged_once(found):
    expected = {str(step - 1): found["points"][step - 1] for step in range(10, 51, 10)}
    followed = dict(list(found["followed"].items())[:5])
    # The point of the guide is all of its posterior.
    assert followed == pytest.approx(expected, rel=1e-6)
