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


def main(found_at):
    path = Path("last.ckpt")
    temporary = path.with_name(".last.ckpt.tmp")
    AtomicCheckpointIO().save_checkpoint({"value": torch.ones(MEGABYTES * 2**18)}, path)
    whole, cut_short, readable = path.stat().st_size, 0, []
    for number in range(5):
        temporary.unlink(missing_ok=True)
        life = Life(save(path, 2.0))
        while not (temporary.exists() and temporary.stat().st_size > number * whole // 8):
            time.sleep(0.0002)
        life.send(signal.SIGKILL)
        life.end()
        cut_short += temporary.exists() and temporary.stat().st_size < whole
        readable.append(float(AtomicCheckpointIO().load_checkpoint(path)["value"].unique()))
    Life(save(path, 2.0)).end()  # over what the last one has left
    after = float(AtomicCheckpointIO().load_checkpoint(path)["value"].unique())
    found = {"cut_short": int(cut_short), "readable": readable, "after": after}
    Path(found_at).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
