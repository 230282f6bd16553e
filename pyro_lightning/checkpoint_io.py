"""How the files of checkpoints are written and read: without code in them."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins import TorchCheckpointIO

from pyro_lightning.weights_only import refuse_code


class WeightsOnlyIO(TorchCheckpointIO):
    """Writes what ``weights_only`` reads, and reads by it unless told otherwise.

    Lightning's own reads a file from the web with all the code in it, and writes anything.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            TypeError: When it could not be read.
        """
        refuse_code(checkpoint)
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only=False`` is the user's own word."""
        return super().load_checkpoint(path, map_location, weights_only is None or weights_only)


def use_weights_only(trainer: Trainer) -> None:
    """Let a Trainer write and read checkpoints by ``weights_only``, unless it has a plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WeightsOnlyIO()
