"""The command line fits a subclass from YAML; keys and errors are those of LightningCLI."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_models import NOISE, Predicted, Regression, Rows, regression_rows
from lightning.pytorch.cli import LightningCLI
from support import quiet_trainer

import pyro_lightning
from pyro_lightning import Prediction
from pyro_lightning.cli import main

HERE = Path(__file__).parent
PACKAGE = Path(pyro_lightning.__file__).parents[1]

# LightningCLI asks jsonargparse and torch for names that newer releases of theirs deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def config(**changes):
    return {
        "seed_everything": 3,
        "trainer": {
            "max_epochs": 60,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": "cli_models.Regression", "init_args": {"dim": 2}},
        "data": {"class_path": "cli_models.Rows", "init_args": {"rows": 500}},
        **changes,
    }


@pytest.fixture(autouse=True)
def command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # LightningCLI saves the configuration it ran
    # LightningCLI warns where it is given arguments while the command line holds others.
    monkeypatch.setattr(sys, "argv", ["pyro-lightning"])


@pytest.fixture
def write(tmp_path):
    def to_file(**changes):
        path = tmp_path / "fit.yaml"
        path.write_text(yaml.safe_dump(config(**changes)))
        return str(path)

    return to_file


def test_a_subclass_is_fitted_from_yaml_to_the_exact_posterior(write):
    svi = main(["fit", "--config", write()]).model
    x, y = regression_rows(500)
    precision = x.T @ x / NOISE**2 + torch.eye(2)
    exact = torch.linalg.solve(precision, x.T @ y / NOISE**2)
    sd = precision.inverse().diagonal().sqrt()
    draws = svi.posterior_samples(20_000)["w"]
    assert type(svi) is Regression and svi.dataset_size == 500
    # After 600 steps the noise of the steps is left; without the scale the sds are 3.2 times these.
    assert ((draws.mean(0) - exact).abs() < 0.2 * sd).all()
    assert ((draws.std(0) / sd - 1).abs() < 0.25).all()


def test_callbacks_are_named_in_yaml(write):
    pytest.importorskip("rich", reason="needs the extra rich")
    named = {
        "KLAnnealing": {"epochs": 1, "start": 0.5},
        "ELBOConvergence": {"window": 20, "r_hat": 3.0, "ess": 1, "mcse": 1},
        "PosteriorMonitor": {"sites": ["w"], "num_samples": 10, "figure_every": 0},
        "SVIProgressBar": {"refresh_rate": 10},
    }
    callbacks = [
        {"class_path": f"pyro_lightning.{name}", "init_args": given}
        for name, given in named.items()
    ]
    changes = {"callbacks": callbacks, "enable_progress_bar": True, "log_every_n_steps": 1}
    model = {"class_path": "cli_models.Regression", "init_args": {"decay": 1.0}}
    path = write(trainer={**config()["trainer"], **changes}, model=model)
    trainer = main(["fit", "--config", path]).trainer
    held = {type(each).__name__ for each in trainer.callbacks}
    assert named.keys() <= held
    assert {"kl_weight", "r_hat", "ess", "mcse"} <= trainer.callback_metrics.keys()
    assert trainer.current_epoch < 60


def test_a_fit_from_yaml_is_the_fit_of_a_script(write):
    torch.manual_seed(3)
    script = Regression()
    quiet_trainer(max_epochs=2).fit(script, datamodule=Rows())
    torch.manual_seed(3)
    trainer = {**config()["trainer"], "max_epochs": 2}
    svi = main(["fit", "--config", write(trainer=trainer)]).model
    for ours, theirs in zip(svi.parameters(), script.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_arguments_override_the_file(write):
    command = ["fit", "--config", write(), "--trainer.max_epochs=1", "--data.init_args.rows=120"]
    cli = main(command)
    assert cli.model.dataset_size == 120 and cli.trainer.current_epoch == 1


def test_validate_takes_n_from_the_datamodule(write):
    data = {"class_path": "cli_models.Rows", "init_args": {"rows": 500, "val_split": 0.2}}
    cli = main(["validate", "--config", write(data=data)])
    assert cli.model.dataset_size == 400
    assert torch.isfinite(cli.trainer.callback_metrics["val_loss"])


def test_a_subclass_works_with_plain_lightning_cli(write):
    flat = {**config(), "model": {"dim": 2}, "data": {"rows": 100}}
    path = Path(write())
    path.write_text(yaml.safe_dump(flat))
    args = ["fit", "--config", str(path), "--trainer.max_epochs=1"]
    cli = LightningCLI(Regression, Rows, auto_configure_optimizers=False, args=args)
    assert cli.model.dataset_size == 100


def test_a_wrong_key_is_the_parsers_error(write, capsys):
    model = {"class_path": "cli_models.Regression", "init_args": {"dims": 2}}
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", write(model=model)])
    assert caught.value.code == 2
    assert "dims" in capsys.readouterr().err


def test_a_wrong_class_path_is_the_parsers_error(write, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", write(model={"class_path": "cli_models.Nothing"})])
    assert caught.value.code == 2
    assert "cli_models.Nothing" in capsys.readouterr().err


def test_a_wrong_field_of_a_prediction_is_an_error_of_jsonargparse(write, capsys):
    init_args = {"model": "cli_models.regression", "prediction": {"num_sample": 7}}
    path = write(model={"class_path": "PyroSVIModule", "init_args": init_args})
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config", path])
    assert caught.value.code == 2
    assert "num_sample" in capsys.readouterr().err


def test_a_quantile_is_named_on_the_command_line(write):
    fields = {"num_samples": 7}
    path = write(model={"class_path": "cli_models.Predicted", "init_args": {"prediction": fields}})
    override = ["--trainer.max_epochs=1", "--model.prediction.summary", "0.95"]
    assert main(["fit", "--config", path, *override]).model.prediction.summary == (0.95,)


def test_print_config_shows_every_argument_of_the_module(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--model", "pyro_lightning.PyroSVIModule", "--print_config"])
    assert caught.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    arguments = {"model", "guide", "elbo", "optimizer", "lr_scheduler", "data_plate"}
    assert arguments | {
        "scale_sites",
        "dataset_size",
        "checks",
        "compile",
        "steps_per_batch",
        "save_example",
        "bad_batches",
        "metrics",
        "prediction",
    } == set(shown)


def test_predictions_are_described_in_yaml_and_made_from_a_checkpoint(write, tmp_path):
    fields = {"num_samples": 7, "summary": ["mean", 0.95], "seed": 1}
    model = {"class_path": "cli_models.Predicted", "init_args": {"prediction": fields}}
    path = write(model=model, data={"class_path": "cli_models.NewRows"})
    fitted = main(["fit", "--config", path, "--trainer.max_epochs=1"])
    fitted.trainer.save_checkpoint(tmp_path / "fit.ckpt")
    assert fitted.model.prediction == Prediction(7, summary=("mean", 0.95), seed=1)
    loaded = Predicted.load_from_checkpoint(tmp_path / "fit.ckpt")
    assert loaded.prediction == fitted.model.prediction
    args = ["predict", "--config", path, "--ckpt_path", str(tmp_path / "fit.ckpt")]
    predicted = main(args)
    expected = quiet_trainer().predict(fitted.model, datamodule=fitted.datamodule)
    assert [each["y"].shape for each in expected] == [(2, 30)] * 3 + [(2, 10)]
    found = quiet_trainer().predict(predicted.model, datamodule=predicted.datamodule)
    assert all(torch.equal(a["y"], b["y"]) for a, b in zip(found, expected, strict=True))


def run(*command, cwd):
    # The package under test, wherever another may be installed.
    path = f"{PACKAGE}{os.pathsep}{HERE}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=200
    )


def test_the_package_runs_as_a_module(write, tmp_path):
    command = ["fit", "--config", write(), "--trainer.max_epochs=1"]
    done = run(sys.executable, "-m", "pyro_lightning", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "max_epochs=1` reached" in done.stdout + done.stderr


@pytest.fixture
def script():
    path = Path(sys.executable).parent / "pyro-lightning"
    if not path.exists():
        pytest.skip("the package is on the path without being installed: no console script")
    return str(path)


def test_the_console_script_is_installed_and_explains_itself(script, tmp_path):
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fit" in done.stdout and "validate" in done.stdout


def test_the_console_script_imports_modules_of_the_current_folder(script, write, tmp_path):
    shutil.copy(HERE / "cli_models.py", tmp_path / "my_models.py")
    model = {"class_path": "my_models.Regression", "init_args": {"dim": 2}}
    path = write(model=model, data={"class_path": "my_models.Rows"})
    done = run(script, "fit", "--config", path, "--trainer.max_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "max_epochs=1` reached" in done.stdout + done.stderr
