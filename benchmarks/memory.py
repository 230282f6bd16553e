"""Memory that training on a large file takes, beyond the interpreter and its imports.

A linear regression is trained from two ``numpy.memmap`` files, shuffled. What is measured is
anonymous memory, ``RssAnon`` of ``/proc/self/status``: file pages that the kernel can take back do
not count. The baseline is read after the imports and the writing of the files, before
``Trainer.fit``. The exit code is 1 when the peak lies more than ``--limit`` above it. With
``--accelerator gpu`` the peak of the GPU's memory is told as well; compare it over ``--rows``.
"""

import argparse
import logging
import sys
import tempfile
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from lightning.pytorch import Trainer, seed_everything

from pyro_lightning import ArrayDataModule, PyroSVIModule

CHUNK = 16_384  # rows written at once: small, so that writing leaves the baseline as it was


def anonymous_mb() -> float:
    """Resident anonymous memory of this process, in MB of 10^6 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


class PeakMemory(threading.Thread):
    """Samples anonymous memory until stopped, and keeps the largest value."""

    def __init__(self, every: float = 0.005) -> None:
        super().__init__(daemon=True)
        self.every, self.stopped = every, threading.Event()
        self.peak, self.samples = anonymous_mb(), 1

    def run(self) -> None:
        while not self.stopped.wait(self.every):
            self.peak, self.samples = max(self.peak, anonymous_mb()), self.samples + 1

    def stop(self) -> float:
        self.stopped.set()
        self.join()
        return max(self.peak, anonymous_mb())


def write_data(folder: Path, rows: int, weights: np.ndarray) -> None:
    """Write x, (rows, columns), and y = x @ weights + noise to files, chunk by chunk."""
    x = np.memmap(folder / "x", np.float32, "w+", shape=(rows, len(weights)))
    y = np.memmap(folder / "y", np.float32, "w+", shape=(rows,))
    rng = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        part = x[start : start + CHUNK]
        part[:] = rng.standard_normal(part.shape, dtype=np.float32)
        y[start : start + CHUNK] = part @ weights + rng.standard_normal(len(part), np.float32)


def read_data(folder: Path, rows: int, columns: int) -> tuple[np.memmap, np.memmap]:
    """Open what ``write_data`` wrote."""
    x = np.memmap(folder / "x", np.float32, "r", shape=(rows, columns))
    return x, np.memmap(folder / "y", np.float32, "r", shape=(rows,))


def linear(x, y):
    """Bayesian linear regression with unknown noise."""
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the data file")
    parser.add_argument("--columns", type=int, default=16, help="columns of x, 4 bytes each")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--blocks", action="store_true", help="shuffle blocks instead of rows")
    parser.add_argument("--val-split", type=float, default=0.0, help="share of rows held out")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--limit", type=float, default=200.0, help="MB over the baseline")
    args = parser.parse_args()
    if not Path("/proc/self/status").exists():
        sys.exit("this benchmark reads RssAnon from /proc/self/status, which Linux alone has")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # The loader is this process alone on purpose: workers would have memory of their own.
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec")
    warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")
    seed_everything(0, verbose=False)

    weights = np.linspace(-1, 1, args.columns, dtype=np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.rows, weights)
        x, y = read_data(folder, args.rows, args.columns)
        svi = PyroSVIModule(linear, optimizer=partial(torch.optim.Adam, lr=1e-2))
        data = ArrayDataModule(
            (x, y),
            batch_size=args.batch_size,
            shuffle="blocks" if args.blocks else True,
            val_split=args.val_split,
        )
        trainer = Trainer(
            max_steps=args.steps,
            limit_val_batches=0,
            accelerator=args.accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        print(f"data: {args.rows:,} x {args.columns} float32, {(x.nbytes + y.nbytes) / 1e6:.0f} MB")
        baseline, memory = anonymous_mb(), PeakMemory()
        memory.start()
        start = time.perf_counter()
        trainer.fit(svi, datamodule=data)
        seconds = time.perf_counter() - start
        growth = memory.stop() - baseline
    error = (svi.posterior_samples(200)["w"].mean(0).cpu() - torch.from_numpy(weights)).abs().max()
    print(f"trained: {trainer.global_step} steps of {args.batch_size} rows in {seconds:.1f} s")
    print(f"largest error of a coefficient: {error:.4f}")
    print(f"anonymous memory before fit: {baseline:.0f} MB ({memory.samples} samples during fit)")
    if args.accelerator == "gpu":
        print(f"peak of the GPU's memory: {torch.cuda.max_memory_allocated() / 1e6:.2f} MB")
    verdict = "within" if growth < args.limit else "OVER"
    print(f"peak growth: {growth:.0f} MB, {verdict} the limit of {args.limit:.0f} MB")
    return int(growth >= args.limit)


if __name__ == "__main__":
    sys.exit(main())
