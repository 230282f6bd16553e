"""Ctrl-C, SIGTERM and SLURM's signal keep the last state, which is that after a step."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from resume_support import Fit, assert_equal, make, rows
from support import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Signals(Callback):
    """Gets signals in a hook, at a step."""

    def __init__(self, hook, step, *numbers):
        self.step, self.numbers = step, numbers
        setattr(self, hook, self._raise)

    def _raise(self, trainer, *_):
        if trainer.global_step == self.step and not trainer.sanity_checking:
            for number in self.numbers:
                signal.raise_signal(number)


def keeps(folder):
    return lambda _: ModelCheckpoint(folder, save_last=True, save_on_exception=True)


@pytest.fixture
def handlers():
    """Handlers of signals, which are the same afterwards."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    # Where tests run in the background, a shell has Ctrl-C ignored.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGINT, found)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, SystemExit), (signal.SIGTERM, SIGTERMException)]
)
@pytest.mark.parametrize("options", [{}, {"steps_per_batch": 2}])
def test_a_signal_in_an_update_waits_for_the_end_of_the_step(
    tmp_path, handlers, number, error, options
):
    made, data = make(**options), rows(val=6)
    whole = Fit(made, data, max_epochs=2)
    stop = lambda: Signals("on_before_optimizer_step", 8, number)  # noqa: E731
    with pytest.raises(error):
        Fit(made, data, callbacks=[stop], saver=keeps(tmp_path), max_epochs=2)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 8 + options.get("steps_per_batch", 1)
    again = Fit(
        made, data, ckpt_path=tmp_path / "last.ckpt", seed=9, saver=keeps(tmp_path), max_epochs=2
    )
    assert_equal(again.state, whole.state)
    assert again.events.seen == whole.events.seen[-len(again.events.seen) :]


def test_a_signal_in_a_validation_stops_it_and_it_is_run_again(tmp_path, handlers):
    flags = {"max_epochs": 2, "val_check_interval": 4}
    whole = Fit(make(), rows(val=6), **flags)
    stop = lambda: Signals("on_validation_batch_start", 10, signal.SIGTERM)  # noqa: E731
    with pytest.raises(SIGTERMException):
        Fit(make(), rows(val=6), callbacks=[stop], saver=keeps(tmp_path), **flags)
    again = Fit(
        make(),
        rows(val=6),
        ckpt_path=tmp_path / "last.ckpt",
        seed=9,
        saver=keeps(tmp_path),
        **flags,
    )
    assert_equal(again.state, whole.state)
    assert again.events.seen == whole.events.seen[-len(again.events.seen) :]
    assert again.events.seen[0][0] == "validation"


def test_a_second_ctrl_c_stops_at_once(handlers):
    steps = []

    class Count(Callback):
        def on_train_batch_end(self, *_):
            steps.append(1)

    twice = lambda: Signals("on_before_backward", 2, signal.SIGINT, signal.SIGINT)  # noqa: E731
    with pytest.raises(SystemExit):
        Fit(make(), rows(), callbacks=[twice, Count])
    assert len(steps) == 2


def test_signals_are_as_they_were_after_a_fit(handlers):
    Fit(make(), rows(), max_epochs=1)


def test_a_handler_of_the_users_own_is_left_alone(handlers):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append("mine"))
    try:
        stop = lambda: Signals("on_before_backward", 2, signal.SIGINT)  # noqa: E731
        Fit(make(), rows(), callbacks=[stop], max_epochs=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["mine"]


def test_a_job_that_slurm_requeues_goes_on(tmp_path, monkeypatch, handlers):
    whole = Fit(make(), rows(), max_epochs=2)
    for name in ("NTASKS", "JOB_NAME", "JOB_ID", "PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name in ("NTASKS", "JOB_ID") else "0")
    requeued = tmp_path / "requeued"
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" > {requeued}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    stop = lambda: Signals("on_before_optimizer_step", 8, signal.SIGUSR1)  # noqa: E731
    kill = lambda: Signals("on_train_batch_start", 10, signal.SIGTERM)  # noqa: E731
    slurm = {"plugins": SLURMEnvironment(), "default_root_dir": tmp_path, "max_epochs": 2}
    first = quiet_trainer(callbacks=[stop(), kill()], **slurm)
    seed_everything(0, verbose=False)
    with pytest.raises(SIGTERMException):
        first.fit(make()(), datamodule=rows()())
    assert requeued.read_text() == "requeue 1\n"
    again = quiet_trainer(**slurm)  # finds the file by itself
    svi = make()()
    again.fit(svi, datamodule=rows()())
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 9
    assert_equal(dict(svi.named_parameters()), whole.state)
