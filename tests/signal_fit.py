"""Sends signals to fits, and goes on from what they leave; what they come to as JSON.

Run as a script, since it forks.
"""

import json
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from fault_fit import different, fit
from lives import Life


def main(path):
    found = {}
    # In the background a shell has Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        for world in (1, 2):

            def run(folder, world=world):
                saves = {"every_n_train_steps": 1000, "save_on_exception": True}
                return partial(fit, folder, world=world, **saves)

            whole = Path(name, f"whole{world}")
            Life(run(whole), world).end()
            for number in (signal.SIGTERM, signal.SIGINT):
                folder = Path(name, f"{number.name}{world}")
                life = Life(run(folder), world)
                life.wait_for(5)
                # The others stop with the one process of a fit that gets a signal.
                life.send(number, only=-1 if number == signal.SIGTERM else None)
                codes = life.end()
                saved = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
                Life(run(folder), world).end()
                ends = [torch.load(each / "end.pt", weights_only=True) for each in (whole, folder)]
                found[f"{number.name}, {world}"] = {
                    "exit_codes": codes,
                    "steps": life.steps[0],
                    "saved": saved,
                    "different": different(*ends),
                }
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
