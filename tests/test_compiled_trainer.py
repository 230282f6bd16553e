"""Compiled losses under Lightning's flags: copies, checkpoints, precision, several processes."""

import copy
import io
import pickle

import pytest
import torch
from compiled_models import CASES, N
from compiled_support import AS_TRACED, assert_equal_steps, is_compiled
from ddp_compiled_fit import FITS
from steps_support import assert_same_fit, fit
from support import quiet_trainer, run_script

from pyro_lightning import ArrayDataModule


@pytest.fixture
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "flags",
    [
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 10.0},
    ],
    ids=["accumulation", "clipping", "clipping of values", "both"],
)
def test_flags_of_the_trainer_are_the_same(double_precision, flags):
    found = fit(1, trainer=flags, compile=AS_TRACED)
    assert is_compiled(found[0])
    assert_same_fit(found, fit(1, trainer=flags), rtol=1e-9, atol=1e-11)


def test_rows_are_clipped_the_same(double_precision):
    found = []
    for options in ({"compile": AS_TRACED}, {}):
        torch.manual_seed(0)
        svi = CASES["rows"].make(**options)
        x = torch.linspace(-1, 2, N)
        trainer = quiet_trainer(max_epochs=2, gradient_clip_val=1.0)
        trainer.fit(svi, datamodule=ArrayDataModule((x,), batch_size=8))
        found.append((svi, trainer))
    assert is_compiled(found[0][0])
    assert_same_fit(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 4])
def test_true_double_precision_is_the_same(steps):
    flags = {"precision": "64-true"}
    found = fit(steps, trainer=flags, compile=AS_TRACED)
    assert found[0]._compiled.compilations == 1
    # Adam makes its count in the default type, which Lightning sets within a training step only.
    assert_same_fit(found, fit(1, trainer=flags), rtol=1e-9, atol=1e-11, check_dtype=False)
    assert all(value.dtype == torch.float64 for value in found[0].state_dict().values())


@pytest.mark.parametrize("steps", [1, 4])
def test_autocast_is_the_same_to_half_precision(steps):
    flags = {"precision": "bf16-mixed"}
    svi, _ = fit(steps, trainer=flags, compile=AS_TRACED)
    assert svi._compiled.compilations == 1
    eager, _ = fit(1, trainer=flags)
    # bfloat16 holds 8 bits, and no more than a few conversions of each value are made.
    torch.testing.assert_close(svi.state_dict(), eager.state_dict(), rtol=0.03, atol=0.03)
    assert all(value.dtype == torch.float32 for value in svi.state_dict().values())


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch])
def test_copies_compile_anew_and_leave_the_original(copied):
    case = CASES["AutoNormal"]
    svi, eager = case.make(compile=AS_TRACED), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(3)), 1e-6, 1e-5)
    twin = copied(svi)
    assert twin._compiled.compilations == 0
    assert twin._compiled.options == AS_TRACED
    with torch.no_grad():
        for module in (twin, eager):
            for parameter in module.parameters():
                parameter.add_(0.1)
    assert_equal_steps(twin, eager, map(case.batch, range(3, 6)), 1e-6, 1e-5)
    assert is_compiled(twin)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.sub_(0.1)
    assert_equal_steps(svi, eager, map(case.batch, range(6, 9)), 1e-6, 1e-5)


def test_checkpoints_hold_no_code(tmp_path):
    svi, trainer = fit(1, compile=AS_TRACED)
    eager, other = fit(1)
    for name, runner in (("compiled", trainer), ("eager", other)):
        runner.save_checkpoint(tmp_path / name)
    found, expected = (
        torch.load(tmp_path / name, weights_only=True) for name in ("compiled", "eager")
    )
    assert found.keys() == expected.keys()
    assert found["state_dict"].keys() == expected["state_dict"].keys()


def test_weights_that_are_loaded_after_compilation_are_used():
    case = CASES["AutoNormal"]
    svi, eager = case.make(compile=AS_TRACED), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(3)), 1e-6, 1e-5)
    state = {name: value + 0.2 for name, value in eager.state_dict().items()}
    for module in (svi, eager):
        module.load_state_dict(state)
    assert_equal_steps(svi, eager, map(case.batch, range(3, 6)), 1e-6, 1e-5)


def test_evaluation_is_eager_and_the_same():
    case = CASES["VAE, dropout"]
    svi, eager = case.make(compile=AS_TRACED), case.make()
    assert_equal_steps(svi, eager, map(case.batch, range(3)), 1e-6, 1e-5)
    with torch.no_grad():
        losses = []
        for module in (svi.eval(), eager.eval()):
            torch.manual_seed(0)
            losses.append(module.loss(case.batch(7)))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    return run_script("ddp_compiled_fit.py", tmp_path_factory.mktemp("ddp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FITS if name != "eager"])
def test_two_processes_find_what_eager_ones_do(of_two_processes, name):
    first, second = of_two_processes[name]["parameters"]
    assert first == second
    assert of_two_processes[name]["compiled"] > 0
    assert of_two_processes[name]["steps"] == of_two_processes["eager"]["steps"]
    expected = of_two_processes["eager"]["parameters"][0]
    assert first == pytest.approx(expected, rel=1e-9, abs=1e-11)


# -- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", ["strict", {"mode": "reduce-overhead"}])
@pytest.mark.parametrize("name", ["AutoNormal", "VAE", "rows"])
def test_cuda_equals_eager(compile, name):
    case = CASES[name]
    svi, eager = case.make(compile=compile).cuda(), case.make().cuda()
    batches = [_on_cuda(case.batch(seed)) for seed in range(5)]
    assert_equal_steps(svi, eager, batches, 1e-5, 1e-4)
    assert is_compiled(svi)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", ["strict", {"mode": "reduce-overhead"}])
def test_cuda_takes_the_same_steps(compile):
    flags = {"accelerator": "cuda"}
    svi, _ = fit(4, trainer=flags, compile=compile)
    eager, _ = fit(1, trainer=flags)
    torch.testing.assert_close(svi.state_dict(), eager.state_dict(), rtol=1e-4, atol=1e-4)


def _on_cuda(batch):
    if hasattr(batch, "rows"):
        return type(batch)(tuple(t.cuda() for t in batch.data), batch.rows.cuda())
    return tuple(t.cuda() for t in batch)
