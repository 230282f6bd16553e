"""Each of two processes draws noise of its own, which follows from the seed, and nothing else."""

import pytest
import torch
from ddp_noise_fit import DATA, STEPS, N
from support import run_script

# At a guide N(m, s) the gradient by m of a draw m + s * eps is (100 + N) * (m + s * eps) - sum(x);
# the density of the guide at its own draw does not move with m.
SD_OF_GRADIENT = (100 + N) * 0.1


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_script("ddp_noise_fit.py", tmp_path_factory.mktemp("ddp"))


def differ(found):
    first, second = (torch.tensor(each) for each in found)
    return bool((first != second).all())


def equal(found):
    first, second = found
    return first == second


def test_the_variance_of_the_gradient_is_that_of_one_process_over_two(found):
    assert equal(found["gradients"])
    gradients = torch.tensor(found["gradients"][0])
    assert len(gradients) == STEPS
    # A variance of S normal draws has the relative sd sqrt(2 / S), 0.045; equal noise on both
    # ranks would give 1 here and not 1/2.
    ratio = float(gradients.var()) / SD_OF_GRADIENT**2
    assert ratio == pytest.approx(1 / 2, rel=4 * (2 / STEPS) ** 0.5)
    # And it is the gradient of this data: its mean has the sd 12 / sqrt(2 * 1000), 0.27.
    mean = float(gradients.mean())
    assert mean == pytest.approx(-float(DATA.sum()), abs=4 * SD_OF_GRADIENT / (2 * STEPS) ** 0.5)


def test_each_rank_draws_its_own_noise_at_each_step(found):
    assert differ(found["losses"])


def test_a_seed_gives_the_same_gradients_again_and_another_seed_others(found):
    first = found["gradients"][0][:5]
    assert found["again"] == first
    assert not set(found["other_seed"]) & set(first)


def test_the_generators_of_all_ranks_are_equal_after_a_fit(found):
    assert equal(found["generators"])


def test_samples_and_losses_after_a_fit_are_equal_on_all_ranks(found):
    assert equal(found["samples"])
    assert equal(found["loss"])


@pytest.mark.parametrize("run", ["validation", "validate"])
def test_evaluations_draw_on_each_rank_what_no_other_does(found, run):
    first, second = found[run]
    assert first != second


def test_the_figure_of_a_validation_is_equal_on_all_ranks(found):
    assert equal(found["val_loss"])


def test_initial_values_are_equal_on_all_ranks_whatever_the_seeds(found):
    assert differ(found["initial"]["rows_before"])
    assert equal(found["initial"]["at_start"])


def test_a_sampler_that_draws_one_order_on_all_ranks_still_does(found):
    first, second = found["own_sampler"]
    for one, other in zip(first, second, strict=True):
        assert sorted([*one, *other]) == list(range(N))


def test_a_guide_that_draws_from_python_and_numpy_does_so_on_each_rank_by_itself(found):
    assert differ(found["in_python"]["steps"])
    assert equal(found["in_python"]["after"])


def test_parameters_that_a_rank_does_not_use_train_where_they_are_looked_for(found):
    assert equal(found["unused"])
    # Three epochs of two steps of Adam at 0.05, from 0 towards about 1.
    assert all(head > 0.1 for head in found["unused"][0])
