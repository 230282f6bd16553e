"""Two processes find the latents of all rows, each from its share of them."""

import pytest
import torch
from ddp_rows_fit import DATA, NOISE, B, N
from support import run_script

# The model is Normal: z_i given mu and x_i has this variance and weight of x_i.
WEIGHT = 1 / (1 + NOISE**2)
VARIANCE = NOISE**2 * WEIGHT
PRECISION = 1 / 100 + N / (1 + NOISE**2)
MU = float(DATA.sum()) / (1 + NOISE**2) / PRECISION


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    found = run_script("ddp_rows_fit.py", tmp_path_factory.mktemp("ddp"))
    assert found["world_size"] == 2
    return found


def test_parameters_of_all_rows_are_equal_on_both_ranks(found):
    first, second = found["parameters"]
    assert first == second


def test_each_rows_latent_is_the_exact_one(found):
    values = torch.tensor(found["parameters"][0])
    locs, scales, mu = values[:N], values[N : 2 * N], values[-1]
    exact = MU + WEIGHT * (DATA - MU)
    sd = (VARIANCE + (1 - WEIGHT) ** 2 / PRECISION) ** 0.5
    # As on one process: the noise of the last steps leaves a few hundredths of an sd.
    assert float(((locs - exact) / sd).square().mean().sqrt()) < 0.15
    torch.testing.assert_close(scales, torch.full((N,), VARIANCE**0.5), rtol=0.1, atol=0)
    assert float(mu) == pytest.approx(MU, abs=0.15 * PRECISION**-0.5)


def test_a_step_sends_the_rows_of_its_batch_however_many_there_are(found):
    few, many = found["sent"].values()
    assert few == many
    # Two tables, each with the number of rows and, byte by byte, the place (int64) and the gradient
    # (float32) of B rows; and the two global parameters.
    assert few == 2 * (1 + B * (8 + 4)) + 2
