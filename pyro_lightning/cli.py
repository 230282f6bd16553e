"""The command ``pyro-lightning``: Lightning's own command line over a ``PyroSVIModule``."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_lightning.module import PyroSVIModule
from pyro_lightning.stored_arguments import OwnArguments


def main(args: Sequence[str] | Mapping[str, Any] | None = None) -> Any:
    """Run ``fit``, ``validate`` or ``test`` from the command line or a YAML file.

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
    from lightning.pytorch import LightningDataModule
    from lightning.pytorch.cli import LightningCLI

    class CommandLine(OwnArguments, LightningCLI):
        """``LightningCLI`` that makes nothing of what a checkpoint says."""

    return CommandLine(
        PyroSVIModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # The module has an optimizer of its own, made once the guide's parameters exist.
        auto_configure_optimizers=False,
        args=list(args) if isinstance(args, Sequence) else args,  # type: ignore[arg-type]
    )


def console() -> None:
    """Entry point of the console script, whose return value would be its exit status."""
    # A YAML file names modules that lie beside it. Python puts the current folder on the path for
    # `python -m`, but for a script the folder of the script, where the user's modules are not.
    sys.path.insert(0, os.getcwd())
    main()
