"""Checkpoint files are written whole or not at all, and damaged ones are refused."""

import gc
import os
import random
import re
import sys
import tempfile
import zipfile
from itertools import chain
from pathlib import Path

import pytest
import torch
from support import run_script

from pyro_lightning import AtomicCheckpointIO
from pyro_lightning.checkpoint_files import write_atomically

STATE = {"loc": torch.arange(300.0), "steps": [1, 2, 3], "name": "fit"}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    return path


def assert_state(path):
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert found.keys() == STATE.keys()
    assert torch.equal(found["loc"], STATE["loc"]) and found["steps"] == STATE["steps"]


# -- reading -------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_was_written(file):
    assert_state(file)
    assert [each.name for each in file.parent.iterdir()] == ["last.ckpt"]


def test_torch_itself_reads_a_flipped_bit_without_a_word(file):
    # The reason for all this; once it fails, torch looks at the sums and so need not we.
    flip(file, file.read_bytes().index(torch.tensor(7.0).numpy().tobytes()) * 8)
    assert not torch.equal(torch.load(file, weights_only=True)["loc"], STATE["loc"])


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_a_flipped_bit_is_an_error_or_changes_nothing(file):
    whole = file.read_bytes()
    table = whole.index(b"PK\x01\x02") * 8  # half of the bits are of the table at the end
    bits = [
        random.Random(0).sample(range(*part), 700) for part in ((table,), (table, len(whole) * 8))
    ]
    refused = 0
    for bit in [*chain(*bits), *folder_flags(whole)]:
        file.write_bytes(whole)
        flip(file, bit)
        try:
            assert_state(file)  # padding between records means nothing
        except ValueError as error:
            assert "last.ckpt' is" in str(error) and "Nothing was loaded" in str(error)
            refused += 1
    assert refused > 700


def folder_flags(data):
    """The bits of the table by which a record is none but a folder."""
    starts = [found.start() for found in re.finditer(b"PK\x01\x02", data)]
    return [(start + 38) * 8 + 4 for start in starts]


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(file, part):
    data = file.read_bytes()
    file.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match="last.ckpt' is (empty|cut short|no checkpoint)"):
        AtomicCheckpointIO().load_checkpoint(file)


def test_a_file_of_something_else_is_refused(file):
    file.write_text("a: 1")
    with pytest.raises(ValueError, match="is no checkpoint: its first bytes"):
        AtomicCheckpointIO().load_checkpoint(file)
    with zipfile.ZipFile(file, "w") as other:
        other.writestr("readme.txt", "no checkpoint")
    with pytest.raises(ValueError, match="is no checkpoint: it is a zip file of something else"):
        AtomicCheckpointIO().load_checkpoint(file)


def test_a_file_that_is_not_there_is_lightnings_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_files_without_checksums_pass(file):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert_state(file)
    torch.save(STATE, file, _use_new_zipfile_serialization=False)
    assert_state(file)


# -- writing -------------------------------------------------------------------------------------


def test_a_full_disk_is_a_clear_error_and_the_file_before_stays(file):
    (file.parent / ".last.ckpt.tmp").symlink_to("/dev/full")  # which takes no byte
    with pytest.raises(RuntimeError, match="last.ckpt' could not be written: No space left") as it:
        AtomicCheckpointIO().save_checkpoint({"loc": torch.zeros(3)}, file)
    assert "that was there before is unchanged" in str(it.value)
    assert_state(file)
    assert [each.name for each in file.parent.iterdir()] == ["last.ckpt"]


# Python tells of it from 3.13 on.
def test_a_failed_write_leaves_nothing_that_cannot_be_closed(file, monkeypatch):
    left = []
    monkeypatch.setattr(sys, "unraisablehook", left.append)
    (file.parent / ".last.ckpt.tmp").symlink_to("/dev/full")
    try:
        AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, file)
    except RuntimeError as error:
        kept = [error]
        kept.append(kept)  # as a program may keep it, until the garbage is collected
        del kept, error
    gc.collect()
    assert not left


def test_a_read_only_folder_is_a_clear_error():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.ckpt")
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0  # who may write anywhere
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(RuntimeError, match="could not be written: Permission denied"):
                write_atomically(b"new", path)
        finally:
            if root:
                os.seteuid(0)
        assert not os.listdir(folder)
        os.chmod(folder, 0o755)


def test_a_folder_that_cannot_be_made_is_a_clear_error(file):
    with pytest.raises(RuntimeError, match="could not be written: (File exists|Not a directory)"):
        AtomicCheckpointIO().save_checkpoint(STATE, file / "last.ckpt")


def test_what_cannot_be_saved_leaves_the_file_before(file):
    with pytest.raises((AttributeError, TypeError)):
        AtomicCheckpointIO().save_checkpoint({"f": (x for x in ())}, file)
    assert_state(file)


@pytest.mark.slow
def test_a_kill_while_a_file_is_written_leaves_the_one_before(tmp_path):
    found = run_script("killed_writing.py", tmp_path)
    assert found["cut_short"] >= 1  # some kills came when a part of the new file was written
    assert found["readable"] == [1.0] * 5
    assert found["after"] == 2.0
