"""Weak scaling: rows a second over 1, 2, ... processes, each of which has B rows a step.

Ideal is R times the rows of one process with R of them, at the time of a step of one. What is lost
is the exchange of gradients and the wait for the slowest. Models: a regression, whose step is short
and whose gradients are few; a network of 1.1 million weights, whose gradients are many; and a
latent for each row, of whose N parameters a step sends those of B. Jobs take turns, round by round;
shown are medians, and the median over rounds of the share of the ideal. Processes of one machine
share its memory and caches: run as many as it has idle cores, or GPUs with ``--accelerator gpu``.

On several machines run one job on each number of them, by torchrun, and compare their rows a
second; the first process prints them::

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint host:29500 \
        benchmarks/scaling.py --accelerator gpu
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn

from pyro_lightning import ArrayDataModule, PyroSVIModule

COLUMNS = 20


class Regression(PyroSVIModule):
    def model(self, x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


class Network(PyroSVIModule):
    def __init__(self, **options):
        super().__init__(**options)
        widths = COLUMNS, 1024, 1024, 1
        layers = [(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, widths[1:], strict=False)]
        self.net = nn.Sequential(*[layer for pair in layers for layer in pair][:-1])

    def model(self, x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x)[:, 0] + bias, 1.0), obs=y)


class Rows(PyroSVIModule):
    def model(self, x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([COLUMNS]).to_event(1))
        with pyro.plate("data", len(x)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x @ w + effect, 1.0), obs=y)


MODELS = {"regression": Regression, "network": Network, "latent of each row": Rows}


class Clock(Callback):
    """Times the steps after the first few."""

    def __init__(self, before, steps):
        self.first, self.last, self.seconds = before, before + steps - 1, 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            self.start = self.now(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.last:
            self.seconds = self.now(pl_module) - self.start

    @staticmethod
    def now(module):
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()


def rows_a_second(args, made, where):
    """Fit on the processes of this job; returns how many there are, and the rows of all."""
    seed_everything(0, verbose=False)
    # An epoch is as long as the job: its start and end are not what is measured.
    processes = where["devices"] * where.get("num_nodes", 1)
    count = max(args.rows, processes * args.batch_size * (args.warm_up + args.steps))
    x = torch.randn(count, COLUMNS)
    clock = Clock(args.warm_up, args.steps)
    trainer = Trainer(
        accelerator=args.accelerator,
        **where,
        strategy="ddp" if processes > 1 else "auto",
        max_steps=args.warm_up + args.steps,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    svi = made(optimizer=partial(torch.optim.Adam, lr=1e-3))
    trainer.fit(svi, datamodule=ArrayDataModule((x, x.sum(-1)), args.batch_size))
    return processes, processes * args.batch_size * args.steps / clock.seconds


def job(args):
    """Measure every model on the processes of one job; the first prints a line of JSON."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    where = {"devices": args.one}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        where = {"devices": here, "num_nodes": int(os.environ["WORLD_SIZE"]) // here}
    found = {}
    for name, made in MODELS.items():
        processes, found[name] = rows_a_second(args, made, where)
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:
        print(json.dumps({"processes": processes, "rows a second": found}))
    if processes > 1:
        torch.distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--rows", type=int, default=200_000, help="N, or more where steps need it")
    parser.add_argument("--batch-size", type=int, default=256, help="B, of each process")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm-up", type=int, default=20, help="steps before those")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", type=int, help="measure on so many processes, once")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "You defined a `validation_step`")
    if args.one is not None or "TORCHELASTIC_RUN_ID" in os.environ:
        job(args)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = {count: {name: [] for name in MODELS} for count in args.processes}
    for _ in range(args.rounds):
        for count in args.processes:
            command = [sys.executable, *sys.argv, "--one", str(count)]
            run = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            line = json.loads(run.stdout.splitlines()[-1])
            for name, value in line["rows a second"].items():
                found[count][name].append(value)
    table = Table("model", "processes", "rows / s", "us a step", "share of the ideal")
    base = min(args.processes)
    for name in MODELS:
        for count in args.processes:
            rates = found[count][name]
            shares = [
                one * base / (other * count)
                for one, other in zip(rates, found[base][name], strict=True)
            ]
            step = 1e6 * count * args.batch_size / median(rates)
            table.add_row(
                name,
                str(count),
                f"{median(rates):,.0f}",
                f"{step:,.0f}",
                f"{median(shares):.2f}",
            )
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
