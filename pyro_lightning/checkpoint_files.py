"""Checkpoint files: written whole or not at all, and read only if no byte of them has changed."""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from pyro_lightning._upstream import open_records

# How files of torch.save before release 1.6 begin; they have no checksums.
_OLD_FORMAT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"
_FOLDER = 0x10
_REMEDY = (
    "Nothing was loaded. Resume from another checkpoint, such as the one before; "
    "`ModelCheckpoint(save_top_k=-1)` keeps all of them"
)


def write_atomically(data: Any, path: str | os.PathLike[str]) -> None:
    """Write a file so that its path names, at every moment, all of the old or all of the new one.

    The bytes go to a temporary file beside it, reach the disk, and are then renamed: a process or
    machine that dies on the way leaves what was there before.

    Args:
        data: Bytes, or a buffer of them.
        path: Where to.

    Raises:
        RuntimeError: When the disk is full, or the folder cannot be written to; what was there
            before is unchanged, and nothing is left of the temporary file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(b"all", Path(folder) / "file")
        ...     (Path(folder) / "file").read_bytes()
        b'all'
    """
    path = Path(path)
    # In the folder of the file: only within a file system is a rename atomic. A name without a
    # number: the next write to the path overwrites what a killed process has left.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        there = os.path.exists(path)
        kept = "The file that was there before is unchanged" if there else "Nothing was written"
        raise RuntimeError(
            f"the checkpoint '{path}' could not be written: {error.strerror or error}. {kept}, and "
            "the training state is as it was. Make room or the folder writable, and save again "
            "or go on from the checkpoint before."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def _sync_folder(folder: Path) -> None:
    """Have a rename reach the disk, where folders can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # a folder that cannot be written to; the error that led here says so


def verify_checkpoint_file(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is cut short, or of which a byte has changed.

    ``torch.save`` keeps the CRC-32 of every record, and ``torch.load`` does not look at it: a bit
    that flipped in a tensor would be loaded silently. Files of the format before torch 1.6, and
    those saved without checksums (``torch.serialization.set_crc32_options(False)``), have none, and
    pass.

    Args:
        path: A local file.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is no checkpoint of ``torch.save``, or not what was saved.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.ckpt"
        ...     torch.save({"loc": torch.zeros(3)}, file)
        ...     verify_checkpoint_file(file)
        ...     _ = file.write_bytes(file.read_bytes()[:-100])
        ...     try:
        ...         verify_checkpoint_file(file)
        ...     except ValueError as error:
        ...         print(str(error).partition(" is ")[2].partition(":")[0])
        cut short
    """
    path = Path(path)
    if path.is_dir():
        return  # of a strategy that writes a folder
    with open(path, "rb") as file:
        head = file.read(len(_OLD_FORMAT))
    if head == _OLD_FORMAT:
        return
    if not head.startswith(_ZIP):
        what = "is empty" if not head else "is no checkpoint: its first bytes are not those of one"
        raise ValueError(f"'{path}' {what}. {_REMEDY}.")
    try:
        with zipfile.ZipFile(path) as records:
            found = records.infolist()
            # Saved without checksums, or else this is the sum of nothing.
            summed = any(each.CRC for each in found if each.file_size)
            damaged = records.testzip() if summed else None
        # A record that is marked as a folder is one without bytes to torch, and not to zipfile.
        folders = [each.filename for each in found if each.external_attr & _FOLDER]
        damaged = damaged or next((name for name in folders if not name.endswith("/")), None)
        saved = any(each.filename.endswith("/data.pkl") for each in found)
        if saved and damaged is None:
            open_records(str(path))
    except zipfile.BadZipFile as error:
        cut = "is not a zip file" in str(error)  # its table stands at the end
        what = "cut short: its end is missing" if cut else f"damaged: {error}"
        raise ValueError(f"the checkpoint '{path}' is {what}. {_REMEDY}.") from error
    except (
        *(EOFError, IndexError, NotImplementedError, OSError, OverflowError, RuntimeError),
        *(ValueError, struct.error, zlib.error),
    ) as error:  # what zipfile makes of tables that are damaged
        raise ValueError(f"the checkpoint '{path}' is damaged: {error}. {_REMEDY}.") from error
    if damaged is not None:
        raise ValueError(
            f"the checkpoint '{path}' is damaged: its record '{damaged}' is not what was saved. "
            f"{_REMEDY}."
        )
    if not saved:
        raise ValueError(f"'{path}' is no checkpoint: it is a zip file of something else.")
