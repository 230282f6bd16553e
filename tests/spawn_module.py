"""Sends modules to a process that is spawned, which computes with them.

Run as a script, which the started process imports; writes what was found as JSON.
"""

import json
import sys

import torch
from picklable import MODULES, batch, figures
from torch import multiprocessing


def work(modules, results):
    for svi in modules:
        torch.manual_seed(0)  # for the initial values of those that have none
        results.put({name: value.tolist() for name, value in figures(svi).items()})


def main(path):
    # The compiled one is compiled anew in each process, which takes long and is tested elsewhere.
    names = [name for name in MODULES if name != "compiled"]
    before, after = ([MODULES[name]() for name in names] for _ in range(2))
    for svi in after:
        svi.loss(batch())
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=work, args=(before + after, results))
    process.start()
    found = [results.get() for _ in before + after]
    process.join()
    here = context.SimpleQueue()
    work(before + after, here)
    expected = [here.get() for _ in before + after]
    names = [f"{name}, {when}" for when in ("before", "after") for name in names]
    with open(path, "w") as file:
        json.dump([dict(zip(names, each, strict=True)) for each in (found, expected)], file)


if __name__ == "__main__":
    main(sys.argv[1])
