"""How the files of checkpoints are written and read: atomically, verified, without code in them."""

import io
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pyro_lightning.arguments import read_flag, read_map_location, read_path
from pyro_lightning.checkpoint_files import verify_checkpoint_file, write_atomically
from pyro_lightning.weights_only import refuse_code


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints of local paths atomically, and verifies them before it reads them.

    What it writes ``torch.load(weights_only=True)`` reads, and it reads by that unless told
    otherwise. Lightning's own reads a file from the web with all the code in it, and writes a file
    in the folder for temporary files and moves it, which over file systems is a copy and can be cut
    short; torch reads a tensor in which a bit has flipped without a word. :class:`PyroSVIModule`
    puts this in the place of Lightning's default; ``Trainer(plugins=[AtomicCheckpointIO()])`` does
    it for other modules, and ``AsyncCheckpointIO(AtomicCheckpointIO())`` beside the fit. Remote
    paths are written as Lightning does.

    Raises:
        TypeError: When a checkpoint could not be read without running code.
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
        refuse_code(checkpoint)
        read_path(path, "path")
        if storage_options is not None or _is_address(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # In memory first, as Lightning does: torch's writer hides which error of the disk it met.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        # Given back at once: where an error keeps this frame, Python could not close the buffer.
        with buffer.getbuffer() as data:
            write_atomically(data, path)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, once its checksums are known to be right.

        ``weights_only=False`` is the user's own word.
        """
        verify_local_file(read_path(path, "path"))
        safe = weights_only is None or read_flag(weights_only, "weights_only")
        return super().load_checkpoint(path, read_map_location(map_location), safe)


def verify_local_file(path: Any) -> None:
    """Verify a checkpoint where it is a file of this machine's, as of :func:`torch.save`.

    Raises:
        ValueError: When it is cut short or damaged.
    """
    if isinstance(path, str | os.PathLike) and not _is_address(path) and os.path.exists(path):
        verify_checkpoint_file(path)


def _is_address(path: Any) -> bool:
    """Whether fsspec, and not the system, knows where a path leads."""
    return "://" in str(path)


def use_safe_files(trainer: Trainer) -> None:
    """Have a Trainer write and read checkpoints so, unless it was given a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def is_checked_as_written(trainer: Trainer | None) -> bool:
    """Whether the one process that there is refuses code as it writes a checkpoint.

    Of several only the first writes, and the others would wait for it.
    """
    if trainer is None or trainer.world_size > 1:
        return False
    return isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
