"""Two processes on the CPU find the posterior of one, with N the whole training set.

They are two of one node, which Lightning starts, and one of each of two, as torchrun starts them.
"""

import pytest
import torch
from ddp_fit import DATA, EPOCHS, B, N
from support import run_script

SD = (100 + N) ** -0.5


@pytest.fixture(scope="module", params=[1, 2], ids=["node", "nodes"])
def found(tmp_path_factory, request):
    return run_script("ddp_fit.py", tmp_path_factory.mktemp("ddp"), nodes=request.param)


def test_n_is_the_whole_training_set_on_each_rank(found):
    assert found["world_size"] == 2
    assert found["dataset_size"] == N


def test_each_rank_visits_its_share_once_an_epoch(found):
    share = (N + 1) // 2  # the sampler repeats a row, so that the shares are equal
    assert found["steps"] == EPOCHS * -(-share // B)


def test_parameters_are_equal_on_both_ranks(found):
    first, second = found["parameters"]
    assert first == second


def test_the_posterior_is_the_exact_one(found):
    # The learning rate ends at 4e-4, so that noise of the last steps is far below a tenth of an sd.
    assert found["mean"] == pytest.approx(float(DATA.sum() / (100 + N)), abs=0.1 * SD)
    assert found["sd"] == pytest.approx(SD, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_gpus_of_a_machine_find_the_exact_posterior(tmp_path):
    found = run_script("ddp_fit.py", tmp_path, "gpu")
    assert found["world_size"] == torch.cuda.device_count()
    assert found["mean"] == pytest.approx(float(DATA.sum() / (100 + N)), abs=0.1 * SD)
    assert found["sd"] == pytest.approx(SD, rel=0.05)


def test_validation_loss_is_scaled_to_n_and_reduced_over_ranks(found):
    # 101 rows in shares of 51, one row twice, scaled by N/B of each batch. With q = N(m, s) the
    # expected negative ELBO is closed; the figure is from one draw a batch, whose sd is
    # N * s * |mean of the residuals|, below 30 nats, of about 1400.
    m, s = found["mean"], found["sd"]
    rows = DATA[:101]
    per_row = 0.5 * torch.tensor(2 * torch.pi).log() + 0.5 * ((rows - m) ** 2).mean() + 0.5 * s**2
    kl = 0.5 * (s**2 * 100 + m**2 * 100 - 1) - torch.tensor(s * 10).log()
    expected = float(N * per_row + kl)
    assert found["val_loss"] == pytest.approx(expected, rel=0.05)
