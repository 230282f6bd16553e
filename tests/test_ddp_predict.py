"""Two processes predict and store what one does: each row once, with the same global draws."""

import pytest
import torch
from ddp_predict import N, S, X, predict
from support import run_script
from torch.utils.data import DataLoader

pytest.importorskip("xarray", reason="the extra `predict` is not installed")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_script("ddp_predict.py", tmp_path_factory.mktemp("ddp_predict"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    loader = DataLoader(X, batch_size=4)
    return predict(tmp_path_factory.mktemp("alone") / "one", loader, 3, devices=1)[1]


@pytest.mark.parametrize("how", ["unseeded", "seeded", "own_sampler"])
def test_each_row_is_stored_once_by_one_of_two_processes(found, how):
    assert found[how]["row"] == list(range(N))
    assert found[how]["stores"] == 2


@pytest.mark.parametrize("how", ["seeded", "own_sampler"])
def test_what_follows_from_the_globals_is_equal_on_one_process_and_two(found, alone, how):
    assert found[how]["level"] == alone["level"]


def test_processes_with_other_random_states_share_the_globals(found):
    mu = torch.tensor(found["unseeded"]["level"]) - X
    torch.testing.assert_close(mu, mu[:, :1].expand(S, N), atol=1e-5, rtol=0)
    assert len(mu[:, 0].unique()) > 0.99 * S  # in single precision two may be equal


def test_a_total_over_the_rows_of_two_processes_has_the_sd_of_the_joint_distribution(found, alone):
    sd = (N + N**2) ** 0.5  # of the guide's N(2, 1) and noise of each row
    for draws in (found["unseeded"]["x"], found["seeded"]["x"], alone["x"]):
        # The sd of 400 draws has a relative standard error of 3.5 percent.
        assert float(torch.tensor(draws).sum(1).std()) == pytest.approx(sd, rel=5 * 0.0354)


def test_rows_of_two_processes_have_noise_of_their_own(found):
    draws = torch.tensor(found["seeded"]["x"])
    noise = draws - (torch.tensor(found["seeded"]["level"]) - X)
    assert noise.T.corrcoef().fill_diagonal_(0).abs().max() < 5 * S**-0.5


def test_predictions_that_are_there_already_are_an_error_of_both_processes(found):
    assert all("holds predictions already" in each for each in found["errors"])
