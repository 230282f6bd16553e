"""Several processes give the losses, gradients and metrics of one, whatever divides the rows."""

import math
from functools import cache

import pytest
import torch
from ddp_padding_fit import CASES, SIZES, measure
from padding_models import DTYPE, FEW, LOC, OTHER, TEST, TRAIN, VAL, N, exact, log_normal
from support import run_script

# All in float64: sums of 1,001 terms in other orders differ by 1e-13 of their value.
close = {"rel": 1e-9, "abs": 1e-9}
SOME = "fewer rows than processes"
OF_ROWS = ("rows", "rows in several steps", "accumulated", "numbered")
EACH = [(name, ranks) for name, case in CASES.items() for ranks in case[2]]
SCALED = [pair for pair in EACH if pair[0] != "alone"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    @cache
    def run(ranks):
        if ranks == 1:
            return measure(1)
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        return run_script("ddp_padding_fit.py", folder, str(ranks))

    return run


def exact_training(name):
    return exact(FEW, size=len(FEW[0])) if name == SOME else exact(TRAIN, name in OF_ROWS)


each_number_of_ranks = pytest.mark.parametrize("ranks", [1, 2, 3])


@pytest.mark.parametrize(("name", "ranks"), SCALED)
def test_the_training_loss_of_an_epoch_is_that_of_all_rows(name, ranks, found):
    figures = found(ranks)[name]["figures"]
    expected, _ = exact_training(name)
    size = len(FEW[0]) if name == SOME else N
    assert figures["train_loss"] == pytest.approx(expected, **close)
    assert figures["train_loss_per_obs"] == pytest.approx(expected / size, **close)


@pytest.mark.parametrize(("name", "ranks"), SCALED)
def test_the_mean_gradient_of_an_epoch_is_that_of_all_rows(name, ranks, found):
    case = found(ranks)[name]
    factor = 1.0
    if name == "loader of batches":
        # A loader that does not tell how many rows it makes: batches weigh by their rows over 143.
        factor = N / 143 / (ranks * case["batches"])
    for parameter, gradient in exact_training(name)[1].items():
        mean = torch.tensor(case["gradient"][parameter], dtype=DTYPE).reshape(gradient.shape)
        torch.testing.assert_close(mean, factor * gradient, rtol=1e-9, atol=1e-9)


@each_number_of_ranks
def test_the_validation_loss_is_that_of_all_its_rows(ranks, found):
    figures = found(ranks)["arrays"]["figures"]
    assert figures["val_loss"] == pytest.approx(exact(VAL)[0], **close)
    assert figures["val_loss_per_obs"] == pytest.approx(exact(VAL)[0] / N, **close)


@each_number_of_ranks
@pytest.mark.parametrize("number", [0, 1])
def test_each_of_several_validation_losses_is_that_of_all_its_rows(number, ranks, found):
    figures = found(ranks)["loader"]["figures"]
    expected, _ = exact((VAL, OTHER)[number])
    assert figures[f"val_loss/dataloader_idx_{number}"] == pytest.approx(expected, **close)


@each_number_of_ranks
def test_the_test_loss_is_that_of_all_its_rows(ranks, found):
    assert found(ranks)["arrays"]["figures"]["test_loss"] == pytest.approx(exact(TEST)[0], **close)


@each_number_of_ranks
@pytest.mark.parametrize("number", [0, 1])
def test_a_users_mean_counts_each_row_once(number, ranks, found):
    figures = found(ranks)["loader"]["figures"]
    mean = (VAL, OTHER)[number][0].mean()
    assert figures[f"val_mean/dataloader_idx_{number}"] == pytest.approx(float(mean), **close)


@each_number_of_ranks
def test_a_users_torchmetric_counts_each_row_once(ranks, found):
    error = float((VAL[0] - VAL[1]).abs().mean())
    # torchmetrics adds up in float32.
    assert found(ranks)["arrays"]["figures"]["val_mae"] == pytest.approx(error, rel=1e-6)


@each_number_of_ranks
def test_a_model_that_scales_nothing_counts_each_row_once(ranks, found):
    case, (x, _), (held_out, _) = found(ranks)["alone"], TRAIN, VAL
    loss = -log_normal(x, LOC, 0.6).sum()
    assert case["figures"]["train_loss"] == pytest.approx(float(loss), **close)
    mean = float(log_normal(held_out, LOC, 0.6).mean())
    assert case["figures"]["val_loss"] == pytest.approx(-N * mean, **close)
    # Each step differentiates the sum over its rows; ranks are averaged.
    slope = -((x - LOC) / 0.6**2).sum() / (ranks * case["batches"])
    assert case["gradient"]["loc"] == pytest.approx([float(slope)], **close)


@pytest.mark.parametrize(("name", "ranks"), EACH)
def test_a_rank_takes_a_step_for_a_repeat_too(name, ranks, found):
    # Rank 0, which reports, has none; it would wait for ever for a rank that took fewer.
    case, share = found(ranks)[name], math.ceil((2 if name == SOME else N) / ranks)
    steps = math.ceil(7 / ranks) if name == "loader of batches" else None
    steps = steps or math.ceil(share / SIZES.get(name, 100))
    assert case["steps"] == (math.ceil(steps / 2) if name == "accumulated" else steps)


@each_number_of_ranks
@pytest.mark.parametrize("steps", [1, 5])
def test_parameters_of_a_row_are_stepped_once_an_epoch(steps, ranks, found):
    for of_rank in found(ranks)[f"stepped, {steps}"]:
        assert of_rank == [1.0] * N
