"""Time of a batch read from a file, rows in random order against shuffled blocks, cold and warm.

Before a cold round the kernel is asked to drop the file's pages (``posix_fadvise``, which needs no
rights). What was read from the disk is ``read_bytes`` of ``/proc/self/io``: missing pages, and what
the kernel reads around each, the ``read_ahead_kb`` of the disk. Orders take turns, round by round;
shown are medians. Read are the first batches of an epoch: of shuffled blocks those of the first
group of blocks, 16.8 million rows of 16 bytes.
"""

import argparse
import gc
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from memory import read_data, write_data
from rich.console import Console
from rich.table import Table

from pyro_lightning import ArrayDataModule

ORDERS = {"random rows": True, "shuffled blocks": "blocks", "in order": False}


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def forget(folder: Path) -> None:
    """Have the kernel drop the pages of the files."""
    gc.collect()  # a datamodule refers to itself, and pages that are mapped are not dropped
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)  # pages that are not yet written would stay
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def read(folder: Path, args: argparse.Namespace, shuffle: bool | str) -> tuple[float, float, float]:
    """Read some batches; returns microseconds a batch, and the bytes read and used by all."""
    data = ArrayDataModule(
        read_data(folder, args.rows, args.columns), args.batch_size, shuffle=shuffle
    )
    before, start, used = bytes_read(), time.perf_counter(), 0
    for batch in islice(data.train_dataloader(), args.batches):
        used += sum(part.nbytes for part in batch)
    seconds = time.perf_counter() - start
    return 1e6 * seconds / args.batches, bytes_read() - before, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000_000, help="rows of the data file")
    parser.add_argument("--columns", type=int, default=3, help="columns of x, 4 bytes each")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--batches", type=int, default=2000, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = Table("rows", "page cache", "us a batch", "disk bytes / byte used")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.rows, np.ones(args.columns, np.float32))
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for _ in range(args.rounds):
            for label, shuffle in ORDERS.items():
                forget(folder)
                found.setdefault((label, "cold"), []).append(read(folder, args, shuffle))
        for path in folder.iterdir():
            with path.open("rb") as file:
                while file.read(2**24):
                    pass
        for _ in range(args.rounds):
            for label, shuffle in ORDERS.items():
                found.setdefault((label, "warm"), []).append(read(folder, args, shuffle))
    for (label, cache), rounds in found.items():
        times, disk, used = (median(column) for column in zip(*rounds, strict=True))
        table.add_row(label, cache, f"{times:.1f}", f"{disk / used:.1f}")
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
