"""Checkpoints that are written atomically, and verified before they are read."""

import io
import os
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pyro_lightning.checkpoint_files import verify_checkpoint_file, write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints of local paths atomically, and verifies them before it reads them.

    Lightning's own writes a file in the folder for temporary files and moves it, which over file
    systems is a copy and can be cut short, and torch reads a tensor in which a bit has flipped
    without a word. :class:`PyroSVIModule` puts this in the place of Lightning's default;
    ``Trainer(plugins=[AtomicCheckpointIO()])`` does it for other modules. Remote paths are left to
    Lightning.

    Raises:
        RuntimeError: When a file cannot be written; the one before is as it was.
        ValueError: When a file is cut short or damaged, before anything is loaded.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "last.ckpt")
        ...     AtomicCheckpointIO().save_checkpoint({"loc": torch.zeros(2)}, path)
        ...     AtomicCheckpointIO().load_checkpoint(path), os.listdir(folder)
        ({'loc': tensor([0., 0.])}, ['last.ckpt'])
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint: all of it, or nothing."""
        if storage_options is not None or _is_address(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # In memory first, as Lightning does: torch's writer hides which error of the disk it met.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(buffer.getbuffer(), path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, once its checksums are known to be right."""
        if not _is_address(path) and os.path.exists(path):
            verify_checkpoint_file(path)
        return super().load_checkpoint(path, *args, **kwargs)


def _is_address(path: Any) -> bool:
    """Whether fsspec, and not the system, knows where a path leads."""
    return "://" in str(path)


def use_atomic_io(trainer: Trainer) -> None:
    """Have a Trainer write and read checkpoints so, unless it was given a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
