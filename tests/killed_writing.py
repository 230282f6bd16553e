"""Kills processes while they write a large checkpoint; what is left as JSON.

Run as a script, since it forks.
"""

import json
import signal
import sys
import time
from pathlib import Path

import torch
from lives import Life

from pyro_lightning import AtomicCheckpointIO

MEGABYTES = 150


def save(path, value):
    state = {"value": torch.full((MEGABYTES * 2**18,), value)}
    return lambda life: AtomicCheckpointIO().save_checkpoint(state, path)


def size_of(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def killed_while_writing(path, temporary, size):
    """Kill a process once it has written so much; whether its file was not yet in place."""
    temporary.unlink(missing_ok=True)
    life = Life(save(path, 2.0))
    while life.alive() and size_of(temporary) <= size:
        time.sleep(0.0002)
    life.send(signal.SIGKILL)
    life.end()
    return temporary.exists()


def main(found_at):
    path = Path("last.ckpt")
    temporary = path.with_name(".last.ckpt.tmp")
    Life(save(path, 1.0)).end()
    whole, cut_short, readable = path.stat().st_size, 0, []
    for number in range(5):
        while not killed_while_writing(path, temporary, number * whole // 8):
            Life(save(path, 1.0)).end()  # it was done before that was seen: once more
        cut_short += temporary.stat().st_size < whole
        readable.append(float(AtomicCheckpointIO().load_checkpoint(path)["value"].unique()))
    Life(save(path, 2.0)).end()  # over what the last one has left
    after = float(AtomicCheckpointIO().load_checkpoint(path)["value"].unique())
    found = {"cut_short": int(cut_short), "readable": readable, "after": after}
    Path(found_at).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
