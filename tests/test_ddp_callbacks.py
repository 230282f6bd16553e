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


def test_the_figure_of_a_step_is_the_mean_over_the_rows_of_both(found):
    case = found["of a step"]
    for figures in case["figures"]:
        for step, expected in zip(figures, case["expected"], strict=True):
            assert step[0] == pytest.approx(expected, rel=1e-5)


def test_a_scheduler_of_steps_leads_both_to_the_same_rates_and_parameters(found):
    case = found["of a step"]
    for each in ("rates", "points"):
        first, second = case[each]
        assert first == second
    assert len(set(case["rates"][0])) > 2  # it has been lowered by what it watches


def test_the_figure_of_the_last_of_several_steps_is_equal_on_both(found):
    first, second = found["of two"]["figures"]
    assert first == second


def test_the_bar_shows_the_figure_of_a_step_of_both(found):
    for figures in found["of a step"]["figures"]:
        assert all(step == bar for step, bar in figures)
