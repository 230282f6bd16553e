"""Two processes skip bad batches without waiting for each other, and stay alike."""

import math

import pytest
from ddp_skipping import B, N
from support import run_script

# Batch 1 of rank 1, and batch 2 of both: in order, their rows come together each time.
SKIPPED = {"train_skipped_batches": 3, "train_skipped_rows": 3 * B}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_script("ddp_skipping.py", tmp_path_factory.mktemp("ddp"))


KINDS = ["one", "several", "accumulated", "rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_stay_equal_on_both_ranks_and_finite(found, kind):
    first, second = found[kind]["parameters"]
    assert first == second
    assert all(math.isfinite(value) for step in first for value in step)
    assert first[-1] != first[0]


@pytest.mark.parametrize("kind", ["one", "rows"])
def test_a_step_that_no_rank_takes_moves_nothing(found, kind):
    steps = found[kind]["parameters"][0]
    for epoch in (0, 6):
        moved = [steps[epoch + i] != steps[epoch + i - 1] for i in range(1, 6)]
        assert moved == [True, False, True, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_n_are_those_of_both_ranks(found, kind):
    for figures in found[kind]["figures"]:
        assert {name: figures[name] for name in SKIPPED} == SKIPPED
    assert found[kind]["dataset_size"] == N - 3 * B


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_is_that_of_the_other_batches(found, kind):
    for figures in found[kind]["figures"]:
        assert figures["val_skipped_batches"] == 3
        assert math.isfinite(figures["val_loss"])
