"""Two processes with other numbers of batches end an epoch together, or end with an error."""

import logging

import pytest
import torch
from ddp_uneven_fit import LOC, UNEQUAL, UNEQUAL_STEPS, B, N, linear, rows
from support import run_script


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_script("ddp_uneven_fit.py", tmp_path_factory.mktemp("ddp"))


def of_both(found, key):
    first, second = found
    assert first[key] == second[key]
    return first[key]


def errors(found):
    assert not found[0]["warnings"]
    return [rank["error"] for rank in found]


def test_an_epoch_of_streams_ends_with_the_shortest(found):
    assert of_both(found["streams"], "steps") == 2 * 4
    assert of_both(found["streams"], "error") is None


def test_the_first_rank_alone_warns_once_of_what_is_left_out(found):
    first, second = (rank["warnings"] for rank in found["streams"])
    assert len(first) == 1
    assert "batch 4, the last of 1 of 2 processes; 1 had more" in first[0]
    assert second == []


def test_a_validation_of_streams_goes_through_all_batches_of_each_rank(found):
    # After each epoch; the second number counts its batches.
    assert [rank["validated"] for rank in found["streams"]] == [[[4, 3], [8, 3]], [[4, 5], [8, 5]]]


def test_the_figure_of_an_uneven_validation_weighs_every_row_alike(found):
    everything = torch.cat([rows(3, 0), rows(5, 1)])
    likelihood = torch.distributions.Normal(LOC, 1.0).log_prob(everything).mean()
    prior = torch.distributions.Normal(0.0, 0.1).log_prob(torch.tensor(LOC))
    expected = float(-N * likelihood - prior)
    assert of_both(found["streams"], "val_loss") == pytest.approx(expected, rel=1e-5)


def test_the_common_last_batch_ends_an_accumulation(found):
    assert of_both(found["accumulated"], "steps") == 2  # batches 1 and 2, and batch 3


@pytest.mark.parametrize(("run", "steps"), [("equal_streams", 3), ("stopped", 2)])
def test_streams_that_end_together_are_no_news(found, run, steps):
    assert of_both(found[run], "steps") == steps
    assert of_both(found[run], "error") is None
    assert of_both(found[run], "warnings") == []


def test_lengths_that_differ_train_and_validate_as_the_shortest_does(found):
    assert of_both(found["lengths"], "steps") == 6
    # At half of the shortest epoch and at its end, each rank through its own validation rows.
    assert [rank["validated"] for rank in found["lengths"]] == [[[3, 2], [6, 2]], [[3, 1], [6, 1]]]
    assert [len(rank["warnings"]) for rank in found["lengths"]] == [1, 0]


def gradient(counts):
    """That of the negative ELBO of all rows, at the point of the guide."""
    everything = torch.cat([linear(count, rank) for rank, count in enumerate(counts)])
    return float(LOC / 0.1**2 - (everything - LOC).sum())


@pytest.mark.parametrize(
    ("run", "counts", "steps"), [("unequal", UNEQUAL, 4), ("unequal_steps", UNEQUAL_STEPS, 4)]
)
def test_each_row_weighs_the_same_where_ranks_have_other_numbers_of_rows(found, run, counts, steps):
    gradients = of_both(found[run], "gradients")
    assert of_both(found[run], "error") is None
    assert len(gradients) == steps == of_both(found[run], "steps")
    assert sum(gradients) / steps == pytest.approx(gradient(counts), rel=1e-5)


def test_a_rank_with_rows_for_fewer_steps_takes_part_in_those_of_the_other(found):
    run = found["streamed_steps"]
    assert of_both(run, "error") is None
    assert of_both(run, "steps") == 4
    # How many rows a stream has is not known: a step of B / 2 rows weighs 1, at any rank.
    weight = sum(UNEQUAL_STEPS) / (2 * 4 * B / 2)
    mean = sum(of_both(run, "gradients")) / 4
    assert mean == pytest.approx(weight * gradient(UNEQUAL_STEPS), rel=1e-5)


@pytest.mark.parametrize(
    ("run", "stage"), [("limit", "training"), ("empty_validation", "validation")]
)
def test_a_rank_without_the_batch_that_others_have_is_an_error_of_all(found, run, stage):
    one, other = errors(found[run])
    assert one == other
    assert one.startswith(f"RuntimeError: the {stage} loader of rank 1 has no batch")


@pytest.mark.parametrize(
    ("run", "error"),
    [
        ("one_fails", "LookupError: only here"),
        ("empty", "the loader has no batch"),
        ("late_loader", "no such file here"),
    ],
)
def test_an_error_of_one_rank_before_the_first_step_is_an_error_of_all(found, run, error):
    one, other = errors(found[run])
    assert one.startswith("RuntimeError: 1 of 2 processes failed before the first step")
    assert "Rank 1 says: " in one and error in one
    assert error in other


def test_ranks_that_read_another_n_are_refused(found):
    assert all("differs between processes: 8, 12" in error for error in errors(found["sizes"]))


def test_a_loader_with_a_length_on_some_ranks_only_is_refused(found):
    assert all("none on rank 0" in error for error in errors(found["lengths_known"]))


def test_parameters_of_rows_alone_are_refused(found):
    assert all(
        "every parameter of this fit belongs to a row" in e for e in errors(found["rows_alone"])
    )


def test_n_read_from_rows_that_nobody_shares_out_is_warned_of(found):
    first, second = (rank["warnings"] for rank in found["parts"])
    assert len(first) == 1
    assert first[0].startswith("N = 8 is read from the loader of each process")
    assert second == []


def test_a_warning_of_the_checks_is_given_by_the_first_rank_alone(found):
    first, second = (rank["warnings"] for rank in found["no_scale"])
    assert sum("data_plate=None scales nothing" in message for message in first) == 1
    assert second == []


def test_what_pyro_finds_is_logged_by_the_first_rank_alone(found):
    first, second = found["logged"]
    assert [line for line in first["lines"] if "max_plate_nesting" in line]
    assert second["lines"] == []
    assert first["level"] == second["level"] == logging.INFO


def test_a_hook_that_leaves_out_what_ranks_need_is_refused(found):
    assert all("super().configure_callbacks()" in error for error in errors(found["no_callbacks"]))


def test_a_trainer_serves_several_modules_one_after_the_other(found):
    assert of_both(found["one_trainer"], "steps") == [2, 4, 6]
