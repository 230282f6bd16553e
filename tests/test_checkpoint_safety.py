"""Checkpoints hold no code: it is refused as it is written, and as it is read."""

import contextlib
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from checkpoint_support import assert_equal_draws
from cli_models import regression_rows
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins import TorchCheckpointIO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from support import normal_mean, quiet_trainer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.cli import main
from pyro_lightning.formats import pack

X = torch.randn(40, generator=torch.Generator().manual_seed(0))
ADAM = partial(torch.optim.Adam, lr=0.1)

# Lightning asks for the callback that saved the checkpoint, and then warns of what it saved.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def rows():
    return ArrayDataModule(X, batch_size=10, val_split=0.25)


def fit(svi, ckpt_path=None, **flags):
    trainer = quiet_trainer(**{"max_epochs": 2, **flags})
    trainer.fit(svi, datamodule=rows(), ckpt_path=ckpt_path)
    return trainer


# -- hostile files ---------------------------------------------------------------------------------


class Hostile:
    """What touches a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint of a fit, with code in it; and the mark that the code leaves."""
    fit(PyroSVIModule(normal_mean)).save_checkpoint(tmp_path / "fit.ckpt")
    checkpoint = torch.load(tmp_path / "fit.ckpt", weights_only=True)
    path, mark = tmp_path / "hostile.ckpt", tmp_path / "mark"
    torch.save({**checkpoint, "pyro_lightning": Hostile(mark)}, path)
    return path, mark


def test_the_code_runs_where_it_is_not_refused(hostile):
    torch.load(hostile[0], weights_only=False)
    assert hostile[1].exists()


USES = {
    "load_from_checkpoint": lambda path: PyroSVIModule.load_from_checkpoint(
        path, model=normal_mean
    ),
    "fit": lambda path: fit(PyroSVIModule(normal_mean), path),
    "validate": lambda path: quiet_trainer().validate(
        PyroSVIModule(normal_mean), datamodule=rows(), ckpt_path=path
    ),
}


@pytest.mark.parametrize("use", USES)
def test_a_hostile_file_is_refused_before_its_code_runs(use, hostile):
    with pytest.raises(Exception, match="Weights only load failed"):
        USES[use](hostile[0])
    assert not hostile[1].exists()


@pytest.fixture
def served(hostile, monkeypatch):
    """The address of the hostile file on a server."""
    monkeypatch.setenv("TORCH_HOME", str(hostile[0].parent / "downloads"))
    handler = partial(SimpleHTTPRequestHandler, directory=hostile[0].parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hostile.ckpt"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("use", USES)
def test_a_hostile_file_from_the_web_is_refused(use, served, hostile):
    with pytest.raises(Exception, match="Weights only load failed"):
        USES[use](served)
    assert not hostile[1].exists()


@pytest.fixture
def instructions(tmp_path):
    """A checkpoint without code that names what is to be called with its example batch."""
    fit(PyroSVIModule(normal_mean)).save_checkpoint(tmp_path / "fit.ckpt")
    checkpoint = torch.load(tmp_path / "fit.ckpt", weights_only=True)
    checkpoint["hyper_parameters"] = {
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "_class_path": "pyro_lightning.module.PyroSVIModule",
        "model": "subprocess.call",
    }
    path, mark = tmp_path / "instructions.ckpt", tmp_path / "mark"
    batch = {"args": ["touch", str(mark)], "pass_fds": torch.tensor([1])}
    stored = {"example": pack(batch), "shown_rows": None, "built_rows": None}
    checkpoint["pyro_lightning"].update(stored)
    torch.save(checkpoint, path)
    return path, mark


def load(path, **options):
    # With a model, of which Lightning makes one as well where the file says so.
    with contextlib.suppress(RuntimeError, TypeError):
        PyroSVIModule.load_from_checkpoint(path, **options)


names_of_newer_releases = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's


@names_of_newer_releases
@pytest.mark.parametrize("obeys", [True, False])
def test_what_a_file_names_is_called_only_where_its_code_is_run_too(instructions, obeys):
    path, mark = instructions
    load(path, **({"weights_only": False} if obeys else {}))
    assert mark.exists() == obeys


class Loaded(LightningDataModule):
    """Rows of which N is not known before the checkpoint is read."""

    def val_dataloader(self):
        return DataLoader(TensorDataset(*regression_rows(20)), batch_size=10)


@names_of_newer_releases
def test_the_command_line_takes_no_arguments_of_a_file(instructions, monkeypatch):
    path, mark = instructions
    monkeypatch.setattr(sys, "argv", ["pyro-lightning"])
    monkeypatch.chdir(path.parent)  # where LightningCLI writes its configuration
    flags = ["--seed_everything=false", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    of = ["--model=cli_models.Regression", f"--data={__name__}.Loaded"]
    with pytest.raises(RuntimeError, match="model and guide do not run on the example batch"):
        main(["validate", *flags, *of, "--ckpt_path", str(path)])
    assert not mark.exists()


# -- what is written -------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": partial(LambdaLR, lr_lambda=lambda epoch: 0.9**epoch),
    "StepLR": partial(StepLR, step_size=1),
    "CosineAnnealingLR": partial(CosineAnnealingLR, T_max=3),
    "OneCycleLR": partial(OneCycleLR, max_lr=0.1, total_steps=10),
    "ReduceLROnPlateau": ReduceLROnPlateau,
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [StepLR(optimizer, 1), LambdaLR(optimizer, lambda epoch: 0.5)], [1]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_fit_with_a_scheduler_is_resumed_by_weights_only(name, tmp_path):
    make = partial(PyroSVIModule, normal_mean, optimizer=ADAM, lr_scheduler=SCHEDULERS[name])
    fit(make()).save_checkpoint(tmp_path / "fit.ckpt")
    assert torch.load(tmp_path / "fit.ckpt", weights_only=True)["lr_schedulers"]
    trainer = fit(make(), tmp_path / "fit.ckpt", max_epochs=3)
    assert trainer.global_step == 9


def latents_of_rows(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_callbacks_and_the_optimizer_of_rows_are_read_by_weights_only(tmp_path):
    callbacks = [
        EarlyStopping("val_loss"),
        ModelCheckpoint(tmp_path, filename="best", monitor="val_loss"),
        Timer(),
    ]
    svi = PyroSVIModule(latents_of_rows, optimizer=ADAM)
    trainer = fit(svi, callbacks=callbacks, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(checkpoint["callbacks"]) == 3
    step = checkpoint["optimizer_states"][0]["state"][0]["step"]
    assert step.shape == X.shape  # a count for each row, of RowAdam
    loaded = PyroSVIModule.load_from_checkpoint(tmp_path / "last.ckpt", model=latents_of_rows)
    trained = svi._trained.nonzero().flatten()
    assert_equal_draws(loaded, svi, rows=trained)


class Counts(Callback):
    """A callback whose state is a number of NumPy's."""

    def state_dict(self):
        return {"seen": [np.float64(3.0)]}


def test_a_callback_whose_state_could_not_be_read_is_refused_as_it_is_saved(tmp_path):
    trainer = fit(PyroSVIModule(normal_mean), callbacks=[Counts()])
    with pytest.raises(TypeError, match=r"a float64 \(checkpoint\['callbacks'\]\['Counts'\]\['s"):
        trainer.save_checkpoint(tmp_path / "fit.ckpt")
    assert not (tmp_path / "fit.ckpt").exists()


class OtherIO(TorchCheckpointIO):
    """What a user's own plugin for files is."""


def test_with_a_plugin_for_files_too(tmp_path):
    trainer = fit(PyroSVIModule(normal_mean), callbacks=[Counts()], plugins=[OtherIO()])
    assert type(trainer.strategy.checkpoint_io) is OtherIO
    with pytest.raises(TypeError, match="a float64"):
        trainer.save_checkpoint(tmp_path / "fit.ckpt")


class Setting:
    def __init__(self, value):
        self.value = value


class Adds(PyroSVIModule):
    """Adds something to a checkpoint after all that is the library's."""

    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        checkpoint["mine"] = Setting(3)


def test_what_a_subclass_adds_is_refused_as_it_is_written(tmp_path):
    trainer = fit(Adds(normal_mean))
    with pytest.raises(TypeError, match=r"a Setting \(checkpoint\['mine'\]\).*add_safe_globals"):
        trainer.save_checkpoint(tmp_path / "fit.ckpt")
    with torch.serialization.safe_globals([Setting]):
        trainer.save_checkpoint(tmp_path / "fit.ckpt")
        assert torch.load(tmp_path / "fit.ckpt", weights_only=True)["mine"].value == 3


# -- hyperparameters -------------------------------------------------------------------------------


class Saves(PyroSVIModule):
    def __init__(self, guide=None, scale=1.0, ignore=()):
        super().__init__(normal_mean, guide or AutoNormal)
        self.save_hyperparameters(ignore=[*ignore, "ignore"])


@pytest.mark.filterwarnings("ignore:Attribute 'guide' is an instance of `nn.Module`")
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("guide", lambda: AutoNormal(normal_mean)),
        ("guide", lambda: AutoDelta),
        ("scale", lambda: torch.tanh),
        ("scale", lambda: Path("here")),
    ],
)
def test_an_argument_that_no_checkpoint_could_hold_is_refused_before_the_fit(argument, value):
    svi = Saves(**{argument: value()})
    trainer = quiet_trainer(max_epochs=1)
    with pytest.raises(TypeError, match=rf"save_hyperparameters\(ignore=\['{argument}'\]\)"):
        trainer.fit(svi, datamodule=rows())
    assert trainer.global_step == 0
    svi = Saves(**{argument: value()}, ignore=[argument])
    assert fit(svi).global_step == 6


def test_a_guide_that_is_ignored_is_given_again_where_the_module_is_loaded(tmp_path):
    svi = Saves(AutoMultivariateNormal, 2.0, ignore=["guide"])
    fit(svi).save_checkpoint(tmp_path / "fit.ckpt")
    loaded = Saves.load_from_checkpoint(tmp_path / "fit.ckpt", guide=AutoMultivariateNormal)
    assert loaded.hparams == {"scale": 2.0, "guide": AutoMultivariateNormal}
    assert_equal_draws(loaded, svi)


class SavesFirst(PyroSVIModule):
    def __init__(self, guide):
        self.save_hyperparameters()
        super().__init__(normal_mean, guide)


@pytest.mark.filterwarnings("ignore:Attribute 'guide' is an instance of `nn.Module`")
def test_a_guide_that_lost_its_model_to_a_copy_is_refused():
    with pytest.raises(ValueError, match="AutoNormal has lost its model.*ignore=.'guide'"):
        SavesFirst(AutoNormal(normal_mean))
