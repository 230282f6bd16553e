"""Loaders of the shards that ``write_streams.py`` writes, for tests that stream them."""

import pyro
import pyro.distributions as dist
import pytest
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from write_streams import DATA, N

MISSING = 'not installed: pip install ".[streaming]"'
litdata = pytest.importorskip("litdata", reason=MISSING)
webdataset = pytest.importorskip("webdataset", reason=MISSING)
__all__ = ["DATA", "N"]
B = 50
quiet = [
    # litdata makes tensors on the bytes of its file; collation copies them.
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
    # WebDataset leaves the files of its shards to the garbage collector.
    pytest.mark.filterwarnings(r"ignore:unclosed file .*rows-\d\.tar:ResourceWarning"),
    # Lightning says so of every stream with a length; litdata's counts ranks and workers.
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
]


def lit_loader(folder, workers=0, batch_size=B, rows=None, **options):
    """A loader of litdata, as its users write it; of some rows, where these are given."""
    dataset = litdata.StreamingDataset(str(folder / "lit"), **options)
    dataset = dataset if rows is None else dataset.subset(rows)
    return litdata.StreamingDataLoader(dataset, batch_size=batch_size, num_workers=workers)


def web_rows(folder, shuffle=False):
    """Batches of WebDataset, which shares its shards out to ranks and workers."""
    rows = webdataset.WebDataset(
        str(folder / "rows-{0..3}.tar"),
        shardshuffle=4 if shuffle else False,
        nodesplitter=webdataset.split_by_node,
    )
    rows = rows.shuffle(100) if shuffle else rows
    return rows.decode().to_tuple("x.npy", "row.cls").batched(B)


def web_loader(folder, workers=0, shuffle=False):
    """A loader of WebDataset, as its users write it."""
    return DataLoader(web_rows(folder, shuffle), batch_size=None, num_workers=workers)


def mean_of(x, row):
    """Mean of a Normal: prior N(0, 0.1), unit noise. Posterior N(sum(x) / (100 + N), ...)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


class RowsSeen(Callback):
    """Keeps the rows of each batch, by epoch."""

    def __init__(self):
        self.epochs = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        rows = batch["row"] if isinstance(batch, dict) else batch[1]
        self.epochs.setdefault(trainer.current_epoch, []).append(rows.tolist())

    def rows(self):
        """The rows of each epoch, sorted."""
        return [sorted(sum(epoch, [])) for epoch in self.epochs.values()]


class SavedAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
