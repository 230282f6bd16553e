"""Callbacks that average parameters, which take a copy of the module before the guide has any."""

from typing import Any

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging


def copy_again(trainer: Any, module: Any, stage: str) -> None:
    """Have callbacks that average parameters copy a module whose parameters were made just now.

    Callbacks are set up before the module is. The copy that they took then has no parameters of
    the guide, and they go through both lists of parameters side by side, up to the end of the
    shorter one.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            callback.setup(trainer, module, stage)
