"""The command ``pyro-lightning``: Lightning's own command line over a ``PyroSVIModule``."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_lightning.life_cycle import LifeCycle
from pyro_lightning.module import PyroSVIModule
from pyro_lightning.stored_arguments import OwnArguments

DESCRIPTION = (
    "Train Pyro models on mini-batches with PyTorch Lightning. --model is a PyroSVIModule, or a "
    "subclass of yours, by its class path; its model, guide, ELBO, optimizer and scheduler are "
    "paths of functions, or class paths with init_args: see 'fit --model.help PyroSVIModule'. "
    "--data is any LightningDataModule, such as an ArrayDataModule of .npy files. Modules of the "
    "current folder can be imported. To begin with: 'fit --model PyroSVIModule --data "
    "ArrayDataModule --print_config=comments > fit.yaml', then 'fit --config fit.yaml'."
)


class SaveConfigOfRun(SaveConfigCallback):
    """Saves the configuration beside the logs of its run, and without a logger nowhere.

    Lightning would then write ``config.yaml`` into the current folder, or refuse to fit where it
    lies already, be it the user's own.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, when the run begins."""
        if trainer.logger is not None:
            super().setup(trainer, pl_module, stage)


class SVICommandLine(OwnArguments, LightningCLI):
    """``LightningCLI`` of any ``PyroSVIModule`` and any ``LightningDataModule``.

    ``--optimizer`` and ``--lr_scheduler`` are those of ``LightningCLI``, for modules without such
    arguments too. They become the module's own, which calls them once the guide's parameters exist:
    Lightning would call them before.

    Args:
        args: Arguments instead of ``sys.argv[1:]``, as a list or a mapping.
        options: More arguments of ``LightningCLI``.
    """

    def __init__(self, args: Any = None, **options: Any) -> None:
        super().__init__(
            PyroSVIModule,
            LightningDataModule,
            save_config_callback=SaveConfigOfRun,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "pyro-lightning", "description": DESCRIPTION},
            args=args,
            **options,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the optimizer and the scheduler."""
        parser.add_argument(
            "--optimizer",
            type=Callable[[Iterable[nn.Parameter]], Optimizer] | None,
            help="Class of the optimizer, or a function from parameters to one; the module's own "
            "by default.",
        )
        parser.add_argument(
            "--lr_scheduler",
            type=Callable[[Optimizer], LRScheduler] | Callable[..., Any] | None,
            help="Class of the scheduler, which steps after each epoch; or a function from the "
            "optimizer to a scheduler or to Lightning's dict of one.",
        )

    def after_instantiate_classes(self) -> None:
        """Give the module the optimizer and scheduler of the command line."""
        svi = self.model
        arguments = self.config_init.get(str(self.subcommand), self.config_init)
        for name in ("optimizer", "lr_scheduler"):
            given = arguments.get(name)
            if given is None:
                continue
            if type(svi).configure_optimizers is not LifeCycle.configure_optimizers:
                self.parser.error(
                    f"--{name} would not be used: {type(svi).__name__} has a configure_optimizers "
                    "of its own"
                )
            setattr(svi, f"_{name}", given)


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> SVICommandLine:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` from the command line or a YAML file.

    The model is any :class:`PyroSVIModule` subclass by its class path, the data any
    ``LightningDataModule``; keys and options are those of ``LightningCLI``.

    Args:
        args: Arguments instead of ``sys.argv[1:]``, as a list or a mapping.

    Returns:
        The ``LightningCLI`` object, with ``trainer``, ``model`` and ``datamodule``.

    Raises:
        ImportError: When the extra ``cli`` is not installed.
    """
    try:
        import jsonargparse  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the command line needs jsonargparse: pip install 'pyro-lightning[cli]'"
        ) from error
    return SVICommandLine(args=list(args) if isinstance(args, Sequence) else args)


def console() -> None:
    """Entry point of the console script, whose return value would be its exit status."""
    # A YAML file names modules that lie beside it. Python puts the current folder on the path for
    # `python -m`, but for a script the folder of the script, where the user's modules are not.
    sys.path.insert(0, os.getcwd())
    main()
