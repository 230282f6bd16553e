"""What fails while a checkpoint is saved or loaded leaves fit and earlier file as they were."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from resume_support import Events, Fit, Saver, assert_equal, global_model, make, rows
from support import quiet_trainer, run_script

from pyro_lightning import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class FillsDisk(Callback):
    """Has the disk full from a step on, for one file."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            (self.folder / ".last.ckpt.tmp").symlink_to("/dev/full")  # which takes no byte


def saves(folder, **options):
    options = {"save_last": True, "save_top_k": 0, "every_n_train_steps": 2, **options}
    return lambda _: ModelCheckpoint(folder, **options)


def test_a_full_disk_stops_a_fit_that_goes_on_later(tmp_path):
    whole = Fit(make(), rows(), max_epochs=2)
    torch.manual_seed(0)
    svi, events = make()(), Events()
    callbacks = [events, FillsDisk(tmp_path, 5), saves(tmp_path)(events)]
    trainer = quiet_trainer(callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
    with pytest.raises(RuntimeError, match="could not be written: No space left on device"):
        trainer.fit(svi, datamodule=rows()())
    assert trainer.global_step == 6
    last = tmp_path / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    # What is in memory is the state after the step, which can be saved once there is room.
    trainer.save_checkpoint(tmp_path / "rescued.ckpt")
    for path in (last, tmp_path / "rescued.ckpt"):
        again = Fit(make(), rows(), ckpt_path=path, seed=9, saver=saves(tmp_path), max_epochs=2)
        assert_equal(again.state, whole.state)


@pytest.mark.parametrize("size", [-50, 100])
def test_a_damaged_file_changes_nothing_of_a_module_that_trained(tmp_path, size):
    first = Fit(make(), rows(), max_epochs=1)
    first.trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    path.write_bytes(path.read_bytes()[:size])
    svi, optimizer = first.svi, first.trainer.optimizers[0]
    before = {name: value.clone() for name, value in svi.state_dict().items()}
    moments = [value["exp_avg"].clone() for value in optimizer.state.values()]
    noise = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ValueError, match="last.ckpt' is cut short.*Resume from another checkpoint"):
        quiet_trainer(max_epochs=2).fit(svi, datamodule=rows()(), ckpt_path=path)
    assert_equal(dict(svi.state_dict()), before)
    assert_equal([value["exp_avg"] for value in optimizer.state.values()], moments)
    assert torch.equal(torch.get_rng_state(), noise[0]) and random.getstate() == noise[1]
    assert (np.random.get_state()[1] == noise[2]).all()


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_damaged_file_is_refused_for_evaluation(tmp_path, stage):
    first = Fit(make(), rows(), max_epochs=1)
    first.trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    data = bytearray(path.read_bytes())
    data[data.index(first.svi.guide.locs.w_unconstrained.detach().numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged: its record"):
        getattr(quiet_trainer(), stage)(first.svi, datamodule=rows(val=6)(), ckpt_path=path)


def test_a_way_to_write_of_the_users_own_is_left_alone():
    class Own(TorchCheckpointIO):
        pass

    found = []
    for plugins in ([], [Own()]):
        trainer = quiet_trainer(plugins=plugins, max_epochs=1)
        trainer.fit(make()(), datamodule=rows()())
        found.append(type(trainer.strategy.checkpoint_io))
    assert found == [AtomicCheckpointIO, Own]


def test_a_fit_goes_on_from_what_a_thread_wrote(tmp_path):
    keep = saves(tmp_path, save_top_k=-1, save_last=False)
    plugins = [AsyncCheckpointIO(AtomicCheckpointIO())]
    fit = Fit(make(), rows(), saver=keep, plugins=plugins, max_epochs=2)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 6
    again = Fit(make(), rows(), ckpt_path=paths[2], seed=9, saver=keep, max_epochs=2)
    assert_equal(again.state, fit.state)


class Fails(Callback):
    """Fails in a hook, at a step."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, hook, self._fail)

    def _fail(self, trainer, *_):
        if trainer.global_step == self.step:
            raise OSError("the network is down")


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward"])
def test_an_error_before_an_update_keeps_the_state_before_the_step(tmp_path, hook):
    whole = Fit(make(), rows(), max_epochs=2)
    failing = lambda: Fails(hook, 9)  # noqa: E731
    keep = saves(tmp_path, save_on_exception=True, every_n_train_steps=50)
    with pytest.raises(OSError, match="network"):
        Fit(make(), rows(), callbacks=[failing], saver=keep, max_epochs=2)
    again = Fit(make(), rows(), ckpt_path=tmp_path / "last.ckpt", saver=keep, max_epochs=2, seed=9)
    assert_equal(again.state, whole.state)


class Breaks(torch.optim.Adam):
    """Fails in its sixth step, when the parameters have moved."""

    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if self.steps == 6:
            raise OSError("the network is down")


@pytest.mark.parametrize("steps", [1, 3])
def test_the_middle_of_an_update_is_not_saved(tmp_path, steps):
    made = make(global_model, optimizer=Breaks, steps_per_batch=steps)
    hook = lambda events: Saver(tmp_path, events, ["on_exception", "on_train_batch_end"])  # noqa: E731
    with pytest.raises(RuntimeError, match="in the middle of a step.*Nothing was written") as it:
        Fit(made, rows(), saver=hook)
    assert "the network is down" in str(it.value.__context__)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{n}-on_train_batch_end.ckpt" for n in range(5 // steps)}


def test_gradients_that_were_added_up_in_part_are_not_saved(tmp_path):
    failing = lambda: Fails("on_after_backward", 1)  # noqa: E731
    hook = lambda events: Saver(tmp_path, events, ["on_exception"])  # noqa: E731
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        Fit(make(), rows(), callbacks=[failing], saver=hook, accumulate_grad_batches=4)
    assert not list(tmp_path.iterdir())


# -- real processes ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "kills"), [("fault_fit.py", 30), ("ddp_fault_fit.py", 5)], ids=["one", "two"]
)
def test_a_fit_that_is_killed_at_random_moments_comes_to_the_same_parameters(
    tmp_path, script, kills
):
    found = run_script(script, tmp_path)
    assert found["killed"] == kills
    assert set(found["exit_codes"]) == {0}
    assert found["steps"][-1] > found["steps"][0]  # it did get on, and not in its last life alone
    assert found["different"] == []
    assert found["counted"][0] == found["counted"][1]  # the state of a callback


@pytest.mark.slow
def test_signals_from_outside_keep_the_last_step(tmp_path):
    found = run_script("signal_fit.py", tmp_path)
    assert set(found) == {"SIGTERM, 1", "SIGINT, 1", "SIGTERM, 2", "SIGINT, 2"}
    for name, one in found.items():
        assert one["saved"] == one["steps"] + 1, name  # the step that the signal came in
        assert one["different"] == [], name
        assert 0 not in one["exit_codes"], name
