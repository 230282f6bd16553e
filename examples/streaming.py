"""A logistic regression from shards on disk, which litdata streams to each process its share.

    python examples/streaming.py --devices 2 --output out

The rows are written once, by ``litdata.optimize``, into ``<output>/shards``; from a bucket they
would be read by the same code. N is read from the data set. The posterior is set beside the
full-data estimate of statsmodels, which holds all rows in memory.
"""

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path

import litdata
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_mean
from rich.console import Console
from rich.table import Table
from torch.optim.lr_scheduler import ExponentialLR as Decay

from pyro_lightning import PyroSVIModule

TRUE = np.array([-0.5, 0.8, -0.3, 0.0, 0.4, -1.0])  # an intercept and slopes
PART, FIRST, LAST = 10_000, 0.02, 1e-4


def rows_of(part, rows):
    """Some of the rows, made from their number, as a simulator or a log would hand them over."""
    rng = np.random.default_rng(part)
    count = min(PART, rows - part * PART)
    x = rng.standard_normal((count, len(TRUE) - 1), np.float32)
    y = rng.random(count) < 1 / (1 + np.exp(-TRUE[0] - x @ TRUE[1:]))
    return x, y.astype(np.float32)


def items(part, rows):
    for x, y in zip(*rows_of(part, rows), strict=True):
        yield {"x": torch.from_numpy(x.copy()), "y": torch.tensor(y)}


def model(x, y):
    weights = pyro.sample("weights", dist.Normal(0.0, 10.0).expand([x.shape[1] + 1]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=weights[0] + x @ weights[1:]), obs=y)


class Shards(LightningDataModule):
    def __init__(self, folder, rows, batch_size, workers):
        super().__init__()
        self.folder, self.rows = folder, rows
        self.batch_size, self.workers = batch_size, workers

    def prepare_data(self):  # Lightning calls it in one process
        if not (self.folder / "index.json").exists():
            parts = list(range(-(-self.rows // PART)))
            options = dict(chunk_size=PART, num_workers=min(2, len(parts)), verbose=False)
            litdata.optimize(partial(items, rows=self.rows), parts, str(self.folder), **options)

    def train_dataloader(self):  # where the processes are there: litdata looks for its rank
        rows = litdata.StreamingDataset(str(self.folder), shuffle=True)
        options = dict(batch_size=self.batch_size, num_workers=self.workers)
        return litdata.StreamingDataLoader(rows, **options)


class Curve(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) / module.dataset_size)


def draw(found, exact, losses, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    at = np.arange(len(TRUE))
    pairs = (("statsmodels, all rows", exact, "k", -0.1), ("streamed", found, "tab:blue", 0.1))
    for name, (mean, sd), colour, shift in pairs:
        bars = dict(fmt="o", ms=4, color=colour, label=name)
        left.errorbar(at + shift, mean - exact[0], 2 * sd, **bars)
    left.set(title="Coefficients less the full-data estimate, 2 sd", xlabel="coefficient")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    right.plot(losses, lw=0.3, color="tab:blue")
    right.set(title="Loss of each batch of the first process, nats a row", xlabel="step")
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="N")
    parser.add_argument("--batch-size", type=int, default=250, help="B")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--devices", type=int, default=1, help="processes on the CPU")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of each")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the figure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning|torch")  # advice, and counts of litdata
    seed_everything(args.seed, verbose=False)
    data = Shards(args.output / f"shards-{args.rows}", args.rows, args.batch_size, args.workers)
    steps = max(1, args.epochs * args.rows // (args.batch_size * args.devices))
    curve, decay = Curve(), (LAST / FIRST) ** (1 / steps)
    svi = PyroSVIModule(
        model,
        partial(AutoMultivariateNormal, init_loc_fn=init_to_mean, init_scale=0.01),
        optimizer=partial(torch.optim.Adam, lr=FIRST),
        lr_scheduler=lambda adam: {"scheduler": Decay(adam, decay), "interval": "step"},
    )
    strategy = "ddp" if args.devices > 1 else "auto"
    quiet = dict(logger=False, enable_checkpointing=False, enable_model_summary=False)
    run = dict(devices=args.devices, strategy=strategy, max_epochs=args.epochs, callbacks=[curve])
    trainer = Trainer(accelerator="cpu", **run, **quiet)
    trainer.fit(svi, datamodule=data)
    if trainer.is_global_zero:
        report(svi, args, curve.losses)
    if args.devices > 1:
        torch.distributed.destroy_process_group()


def report(svi, args, losses):
    draws = svi.posterior_samples(4000)["weights"].numpy()
    found = draws.mean(0), draws.std(0)
    parts = [rows_of(part, args.rows) for part in range(-(-args.rows // PART))]
    x, y = (np.concatenate(each) for each in zip(*parts, strict=True))
    full = sm.Logit(y, sm.add_constant(x.astype(float))).fit(disp=False)
    exact = full.params, full.bse
    table = Table("", "true", "statsmodels", "streamed", title=f"N = {svi.dataset_size:,}")
    for i, true in enumerate(TRUE):
        cells = (f"{mean[i]:.4f} ± {sd[i]:.4f}" for mean, sd in (exact, found))
        table.add_row("intercept" if i == 0 else f"slope {i}", f"{true:.1f}", *cells)
    Console(width=80).print(table)
    off, ratio = np.abs(found[0] - exact[0]).max() / exact[1].max(), (found[1] / exact[1]).mean()
    print(f"off by at most {off:.2f} of a standard error; sd / standard error: {ratio:.2f}")
    agree = off < 0.5 and 0.75 < ratio < 1.25
    print("Verdict:", "they agree." if agree else "they DIFFER; train longer.")
    args.output.mkdir(parents=True, exist_ok=True)
    draw(found, exact, losses, args.output / "streaming.png")


if __name__ == "__main__":
    main()
