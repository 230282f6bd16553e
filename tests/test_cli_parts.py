"""The command line makes model, guide, ELBO, optimizer, scheduler and data from paths."""

import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_models import Guide, Network, Regression, Rows, model, regression_rows, step_decay
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningCLI
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule, RowAdam
from pyro_lightning.cli import main

# LightningCLI asks jsonargparse and torch for names that newer releases of theirs deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

QUIET = {
    "max_epochs": 2,
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
ROWS = {"class_path": "cli_models.Rows"}


@pytest.fixture(autouse=True)
def command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # LightningCLI saves the configuration it ran
    # LightningCLI warns where it is given arguments while the command line holds others.
    monkeypatch.setattr(sys, "argv", ["pyro-lightning"])


@pytest.fixture
def fit(tmp_path):
    """Fits what a YAML file of these parts says, and arguments; returns the module."""

    def run(*arguments, data=ROWS, trainer=QUIET, **parts):
        path = tmp_path / "fit.yaml"
        written = {"seed_everything": 3, "trainer": trainer, "data": data, **parts}
        path.write_text(yaml.safe_dump(written))
        return main(["fit", "--config", str(path), *arguments]).model

    return run


def script(module, data=None):
    """The fit of a script: the module is made after the seed is set, as in any script."""
    seed_everything(3, verbose=False)
    svi = module()
    quiet_trainer(max_epochs=2).fit(svi, datamodule=data or Rows())
    return svi


def assert_same(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def path(name, **init_args):
    return {"class_path": name, "init_args": init_args} if init_args else {"class_path": name}


EVERYTHING = {
    "model": "cli_models.model",
    "guide": path("pyro.infer.autoguide.AutoLowRankMultivariateNormal", init_scale=0.05, rank=1),
    "elbo": path("pyro.infer.TraceMeanField_ELBO", num_particles=3),
    "optimizer": path("torch.optim.RMSprop", lr=0.003),
    "lr_scheduler": path("torch.optim.lr_scheduler.ExponentialLR", gamma=0.5),
}


def test_every_part_from_yaml_is_the_fit_of_a_script_bit_for_bit(fit):
    svi = fit(model=path("pyro_lightning.PyroSVIModule", **EVERYTHING))
    theirs = script(
        lambda: PyroSVIModule(
            model,
            partial(AutoLowRankMultivariateNormal, init_scale=0.05, rank=1),
            TraceMeanField_ELBO(num_particles=3),
            partial(torch.optim.RMSprop, lr=0.003),
            partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        )
    )
    assert type(svi.guide) is AutoLowRankMultivariateNormal
    assert_same(svi, theirs)


def test_a_model_class_with_arguments_of_its_own(fit):
    network = path("cli_models.Network", prior_sd=0.01)
    svi = fit(model=path("pyro_lightning.PyroSVIModule", model=network))
    assert type(svi.model) is Network and svi.model.prior_sd == 0.01
    assert_same(svi, script(lambda: PyroSVIModule(Network(prior_sd=0.01))))


def test_a_guide_class_that_is_no_autoguide(fit):
    guide = path("cli_models.Guide", start=0.5)
    svi = fit(model=path("PyroSVIModule", model="cli_models.model", guide=guide))
    assert type(svi.guide) is Guide
    assert_same(svi, script(lambda: PyroSVIModule(model, Guide(start=0.5))))


@pytest.mark.parametrize(
    ("guide", "parameters"),
    [
        ("cli_models.guide", ["loc"]),
        ("pyro.infer.autoguide.AutoDelta", ["w"]),
        ("AutoDiagonalNormal", ["loc", "scale"]),
        ("cli_models.near_zero", ["loc", "scale", "scale_tril"]),
    ],
    ids=["function", "class", "name", "partial"],
)
def test_a_guide_by_its_path_alone(fit, guide, parameters):
    svi = fit(model=path("PyroSVIModule", model="cli_models.model", guide=guide))
    found = {name.split(".")[-1].removesuffix("_unconstrained") for name in svi.state_dict()}
    assert set(parameters) <= found


def test_the_command_line_alone(fit):
    svi = fit(
        "--model=PyroSVIModule",
        "--model.model=cli_models.model",
        "--model.guide=AutoNormal",
        "--model.guide.init_scale=0.3",
        "--model.elbo=Trace_ELBO",
        "--model.elbo.num_particles=2",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=1e-5",
        "--model.lr_scheduler=cli_models.step_decay",
    )
    theirs = script(
        lambda: PyroSVIModule(
            model,
            partial(AutoNormal, init_scale=0.3),
            Trace_ELBO(num_particles=2),
            partial(torch.optim.SGD, lr=1e-5),
            step_decay,
        )
    )
    assert_same(svi, theirs)


def test_an_optimizer_of_rows_by_its_class_path(fit):
    optimizer = path("RowAdam", lr=0.002, betas=[0.8, 0.9])
    svi = fit(model=path("PyroSVIModule", model="cli_models.model", optimizer=optimizer))
    ours = partial(RowAdam, lr=0.002, betas=(0.8, 0.9))
    assert_same(svi, script(lambda: PyroSVIModule(model, optimizer=ours)))


def test_the_nesting_of_plates_is_a_whole_number(fit):
    arguments = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = {"class_path": "Trace_ELBO", "init_args": arguments}
    svi = fit(model=path("PyroSVIModule", model="cli_models.model", elbo=elbo))
    assert_same(svi, script(lambda: PyroSVIModule(model, elbo=Trace_ELBO(**arguments))))


def test_optimizer_and_scheduler_of_a_subclass_without_such_arguments(fit):
    subclass = path("cli_models.Regression")
    svi = fit(
        "--optimizer=SGD", "--optimizer.lr=1e-5", "--lr_scheduler=StepLR",
        "--lr_scheduler.step_size=1", model=subclass,
    )  # fmt: skip

    def theirs():
        module = Regression()
        optimizer = partial(torch.optim.SGD, lr=1e-5)
        module.configure_optimizers = lambda: [
            [made := optimizer(module.parameters())],
            [torch.optim.lr_scheduler.StepLR(made, step_size=1)],
        ]
        return module

    assert_same(svi, script(theirs))


def test_an_optimizer_that_the_module_would_not_use_is_an_error(fit, capsys):
    with pytest.raises(SystemExit):
        fit("--optimizer=Adam", model=path("cli_models.OwnOptimizer"))
    said = capsys.readouterr().err
    assert "--optimizer would not be used: OwnOptimizer has a configure_optimizers" in said


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_data_from_files(fit, tmp_path, kind):
    arrays = {name: each.numpy() for name, each in zip("xy", regression_rows(500), strict=True)}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.savez(tmp_path / "both.npz", **arrays)
    files = {"npy": {"x": "x.npy", "y": "y.npy"}, "npz": "both.npz"}[kind]
    data = path("pyro_lightning.ArrayDataModule", arrays=files, batch_size=50, val_split=0.1)
    svi = fit(model=path("PyroSVIModule", model="cli_models.model"), data=data)
    same = ArrayDataModule(arrays, 50, val_split=0.1)
    assert_same(svi, script(lambda: PyroSVIModule(model), same))


def test_the_module_itself_works_with_plain_lightning_cli(tmp_path):
    written = {"seed_everything": 3, "trainer": QUIET, "model": EVERYTHING, "data": {"rows": 100}}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(written))
    cli = LightningCLI(
        PyroSVIModule, Rows, auto_configure_optimizers=False, args=["fit", "--config", "fit.yaml"]
    )
    assert type(cli.model.guide) is AutoLowRankMultivariateNormal
    assert cli.model.dataset_size == 100


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["fit", *arguments])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_a_printed_configuration_is_complete_and_fits(fit, capsys):
    parts = ["--model.model=cli_models.model", "--data=cli_models.Rows", "--seed_everything=3"]
    parts += [f"--trainer.{key}={value}" for key, value in QUIET.items()]
    text = printed(capsys, "--model=PyroSVIModule", *parts, "--print_config")
    shown = yaml.safe_load(text)
    svi = fit(**{key: shown[key] for key in ("model", "data", "trainer", "optimizer")})
    assert_same(svi, script(lambda: PyroSVIModule(model)))


def test_a_printed_configuration_explains_every_argument(capsys):
    text = printed(
        capsys, "--model=PyroSVIModule", "--data=ArrayDataModule", "--print_config=comments"
    )
    lines = [line.strip() for line in text.splitlines()]
    for part in ("model", "data"):
        arguments = yaml.safe_load(text)[part]["init_args"]
        assert len(arguments) > 10
        for name in arguments:
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
            assert lines[at - 1].startswith("#"), name


def test_help_names_every_argument_of_the_module_with_a_sentence(capsys):
    text = " ".join(printed(capsys, "--model.help=PyroSVIModule").split())
    for sentence in (
        "--model.guide GUIDE An autoguide class",
        "--model.elbo ELBO A ``Trace_ELBO`` (the default)",
        "--model.optimizer OPTIMIZER A callable from parameters to a torch optimizer",
        "--model.dataset_size DATASET_SIZE N, where it cannot",
    ):
        assert sentence in text


def test_help_of_the_command_says_how_to_begin(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: pyro-lightning")
    # argparse breaks the line after the hyphens of an option.
    assert "--model is a PyroSVIModule" in " ".join(text.split())
    assert "--print_config=comments > fit.yaml" in " ".join(text.split()).replace("- ", "-")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"guide": "AutoNothing"}, "AutoNothing"),
        ({"guide": path("AutoNormal", init_scales=0.1)}, "init_scales"),
        ({"elbo": path("Trace_ELBO", particles=3)}, "particles"),
        ({"elbo": "cli_models.model"}, "cli_models.model"),
        ({"optimizer": path("torch.optim.Adam", lr="fast")}, "fast"),
        ({"lr_scheduler": path("ExponentialLR")}, "gamma"),
        ({"model": "cli_models.nothing"}, "cli_models.nothing"),
        ({"checks": "maybe"}, "maybe"),
        ({"dataset_size": 1.5}, "1.5"),
    ],
    ids=["guide", "guide-key", "elbo-key", "elbo", "rate", "missing", "model", "flag", "count"],
)
def test_a_wrong_part_is_the_parsers_error(fit, capsys, changes, named):
    with pytest.raises(SystemExit) as caught:
        fit(model=path("PyroSVIModule", **{"model": "cli_models.model", **changes}))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert named in said and "Traceback" not in said


def test_a_checkpoint_is_validated_and_tested_by_the_configuration_of_its_fit(tmp_path):
    trainer = {**QUIET, "enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    parts = path("PyroSVIModule", model="cli_models.model", guide=path("AutoNormal"))
    splits = path("cli_models.Rows", val_split=0.2, test_split=0.2)
    written = {"seed_everything": 3, "trainer": trainer, "model": parts, "data": splits}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(written))
    fitted = main(["fit", "--config", "fit.yaml"])
    best = fitted.trainer.checkpoint_callback.best_model_path
    for stage, name in (("validate", "val_loss"), ("test", "test_loss")):
        found = main([stage, "--config", "fit.yaml", "--ckpt_path", best])
        assert_same(found.model, fitted.model)
        assert found.model.dataset_size == 300
        assert torch.isfinite(found.trainer.callback_metrics[name])


def test_the_configuration_of_the_readme_runs(tmp_path, monkeypatch):
    text = (CONFIGS.parents[1] / "README.md").read_text()
    written = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "fit.yaml").write_text(written.replace("my_models.regression", "cli_models.model"))
    for name, array in zip("xy", regression_rows(600), strict=True):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    quiet = [f"--trainer.{key}={value}" for key, value in QUIET.items()]
    svi = main(["fit", "--config", "fit.yaml", *quiet]).model
    assert svi.dataset_size == 600 and svi.elbo.num_particles == 4
    assert torch.isfinite(svi.posterior_samples(10)["w"]).all()


CONFIGS = Path(__file__).parents[1] / "examples" / "configs"


def test_the_configuration_of_a_run_lies_beside_its_logs_and_fits_again(fit, tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    arguments = {"save_dir": str(tmp_path), "name": "logs"}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": arguments}
    parts = path("PyroSVIModule", model="cli_models.model")
    for version in (0, 1):
        fitted = fit("--optimizer=SGD", trainer={**QUIET, "logger": logger}, model=parts)
        saved = str(tmp_path / f"logs/version_{version}/config.yaml")
    assert_same(main(["fit", "--config", saved, "--trainer.logger=false"]).model, fitted)
    assert (tmp_path / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize("name", sorted(each.stem for each in CONFIGS.glob("*.yaml")))
def test_configurations_of_the_examples_run(name, monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS.parent))
    cli = main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--trainer.max_epochs=1"])
    assert cli.trainer.current_epoch == 1
    assert torch.isfinite(cli.trainer.callback_metrics["train_loss"])
    if name == "checked":
        logged = {"val_elpd", "val_elpd_se", "val_coverage_0.9", "kl_weight"}
        assert logged <= cli.trainer.callback_metrics.keys()


def test_without_jsonargparse_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-lightning\[cli\]'"):
        main(["fit"])
