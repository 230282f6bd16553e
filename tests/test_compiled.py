"""Compiled losses equal eager ones at equal noise, for every kind of model and guide."""

import pytest
import torch
from compiled_models import CASES
from compiled_support import AS_TRACED, assert_equal_steps, is_compiled

# Their pieces are small differences of large terms: eager itself is good to this only.
GRADIENTS_TO = 1e-5


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_traces_equal_eager_in_single_precision(case):
    svi, eager = case.make(compile=AS_TRACED), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(4)), 1e-6, GRADIENTS_TO)
    assert is_compiled(svi)


def test_traces_equal_eager_in_double_precision(double_precision, case):
    svi, eager = case.make(compile=AS_TRACED), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(4)), 1e-10, 1e-10)
    assert is_compiled(svi)


@pytest.mark.slow
# torch's own lowering of triangular matrices asks for a name that torch gave up.
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")
def test_inductor_equals_eager(case):
    svi, eager = case.make(compile="strict"), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(4)), 1e-6, GRADIENTS_TO)
    assert is_compiled(svi)


@pytest.mark.slow
def test_inductor_equals_eager_in_double_precision(double_precision):
    case = CASES["score function"]
    svi, eager = case.make(compile="strict"), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(4)), 1e-10, 1e-10)
    assert is_compiled(svi)


def test_batch_norm_moves_its_statistics_once_a_step():
    case = CASES["VAE, BatchNorm"]
    svi, eager = case.make(compile=AS_TRACED), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(5)), 1e-6, GRADIENTS_TO)
    moved = [(n, b) for n, b in svi.named_buffers() if "running" in n or "tracked" in n]
    assert len(moved) == 3
    for name, buffer in moved:
        torch.testing.assert_close(buffer, eager.get_buffer(name))
    assert int(svi.get_buffer(next(n for n, _ in moved if "tracked" in n))) == 5
