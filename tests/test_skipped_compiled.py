"""Steps of compiled code that are skipped: as if their batch had not come, as in eager code."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from compiled_support import AS_TRACED
from pyro.infer.autoguide import AutoDelta
from skip_support import N, fit, rows
from steps_support import assert_same_fit
from support import no_validation, normal_mean
from torch import nn

from pyro_lightning import ArrayDataModule

pytestmark = [
    no_validation,
    pytest.mark.filterwarnings("ignore:Encountered NaN"),
    # Lightning says so, once, of a step that is not taken.
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:batches skipped in"),
]


def test_whole_steps_in_compiled_code_skip_what_eager_ones_do():
    def still(compile):
        model = normal_mean if compile is False else unchecked_mean
        data = ArrayDataModule(rows(17, 30), batch_size=4)
        return fit(data, model, AutoDelta, steps_per_batch=2, compile=compile, dataset_size=N)

    (svi, trainer), (other, reference) = still(AS_TRACED), still(False)
    assert any(entry.fused is not None for entry in svi._compiled._entries)
    for name in ("train_skipped_batches", "train_skipped_rows"):
        assert trainer.callback_metrics[name] == reference.callback_metrics[name] > 0
    assert svi.dataset_size == other.dataset_size == N - 2
    # N is right from the second epoch on in compiled code, and from the bad batch on in eager:
    # a twentieth of the force in one of three epochs, on steps of 0.01.
    torch.testing.assert_close(svi.state_dict(), other.state_dict(), rtol=0, atol=0.01)


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Encoded(nn.Module):
    """Model and guide of latents of rows, with running statistics and dropout; without N."""

    def __init__(self):
        super().__init__()
        norm = nn.BatchNorm1d(1), nn.Linear(1, 4), nn.Dropout(), nn.Linear(4, 1)
        self.encoder = nn.Sequential(*norm)

    def forward(self, x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    def guide(self, x):
        loc = self.encoder(x[:, None]).squeeze(-1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5, validate_args=False))


@pytest.mark.parametrize("steps", [1, 2])
def test_skipped_steps_of_compiled_code_leave_buffers_and_noise_as_eager_ones_do(
    double_precision, steps
):
    def fitted(compile):
        torch.manual_seed(4)
        model = Encoded()
        options = {"steps_per_batch": steps, "compile": compile, "data_plate": None}
        data = ArrayDataModule(rows(17, 30, 31).double(), batch_size=4)
        return fit(data, model, model.guide, checks=False, **options)

    found, reference = fitted(AS_TRACED), fitted(False)
    assert any(entry.fused is not None for entry in found[0]._compiled._entries)
    assert found[1].callback_metrics["train_skipped_batches"] > 0
    assert all(value.isfinite().all() for value in found[0].state_dict().values())
    assert_same_fit(found, reference, rtol=1e-9, atol=1e-11)


def unchecked_mean(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0, validate_args=False), obs=x)
