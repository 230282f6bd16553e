"""The refusal of modules that callbacks of this package do not serve."""

from typing import Any

from lightning.pytorch import Callback

from pyro_lightning.module import PyroSVIModule


def check_served(callback: Callback, pl_module: Any) -> None:
    """Refuse another module than a ``PyroSVIModule``.

    Raises:
        TypeError: Naming the callback and the class of the module.
    """
    if not isinstance(pl_module, PyroSVIModule):
        who, got = type(callback).__name__, type(pl_module).__name__
        raise TypeError(f"{who} serves a PyroSVIModule, got {got}")
