"""Whatever a fit is given: the gradient of the full data, or an error that names the cause.

Each example draws rows, a loader of them, what is said of N, and flags of the Trainer. At a point
that stays where it is, the mean gradient and the loss of the epoch are those of a closed form over
the rows that came. 100 examples, the same each time.
"""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pyro.infer.autoguide import AutoDelta
from support import no_validation, quiet_trainer
from test_bad_inputs import JUNK, examples, result_or_named
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule

pytestmark = [
    no_validation,
    pytest.mark.filterwarnings("ignore:Encountered NaN"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays"),
]

ROWS, AT = 12, 0.3
X = torch.linspace(-1.0, 2.0, ROWS)
Y = X.flip(0) + 0.5
HALF_LOG = 0.5 * math.log(2 * math.pi)


def model(x, y):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(weight * x, 1.0), obs=y)


POINT = partial(AutoDelta, init_loc_fn=lambda site: torch.tensor(AT))


class Seen(Callback):
    """Keeps the rows that came, by batch, and the gradient of each step."""

    def __init__(self):
        self.batches, self.gradients = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch = getattr(batch, "data", batch)
        columns = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        self.batches.append([column.double().flatten() for column in columns])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(float(pl_module.guide.weight.grad))

    def rows(self):
        return [torch.cat(column) for column in zip(*self.batches, strict=True)]


class Pairs(Dataset):
    """Rows of columns, of which one may be shorter."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, row):
        return tuple(column[row] for column in self.columns)


class Stream(IterableDataset):
    def __init__(self, columns):
        self.columns = columns

    def __iter__(self):
        yield from zip(*self.columns, strict=True)


class Data(LightningDataModule):
    """A datamodule of the user's own that states N."""

    def __init__(self, loader, dataset_size):
        super().__init__()
        self.loader, self.dataset_size = loader, dataset_size

    def train_dataloader(self):
        return self.loader


CHANGES = ["nan", "inf", "int", "double", "wide", "short", "one", "complex"]


@st.composite
def columns(draw):
    x, y = X.clone(), Y.clone()
    change = draw(
        st.sampled_from(
            [None] * 8 + ["nan", "inf", "int", "double", "wide", "short", "one", "complex"]
        )
    )
    if change in ("nan", "inf"):
        y[draw(st.integers(0, ROWS - 1))] = float(change)
    changed = {
        "int": lambda: (y * 4).long(),
        "double": y.double,
        "wide": lambda: y[:, None],
        "short": lambda: y[:-1],
        "one": lambda: y[:1],
        "complex": lambda: y * 1j,
    }
    return x, changed.get(change, lambda: y)()


def in_order(rows, size):
    return [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]


def cut(data, size):
    return [
        tuple(column[start : start + size] for column in data) for start in range(0, ROWS, size)
    ]


SIZED = {
    "arrays": lambda data, size, **how: ArrayDataModule(data, batch_size=size, **how),
    "dict of arrays": lambda data, size, **how: ArrayDataModule(
        dict(zip("xy", data, strict=True)), batch_size=size, **how
    ),
    "rows": lambda data, size, **how: DataLoader(Pairs(data), batch_size=size, **how),
    "numbered": lambda data, size, **how: DataLoader(
        IndexedDataset(Pairs(data)), batch_size=size, **how
    ),
    "batches": lambda data, size, **how: DataLoader(
        Pairs(data), batch_sampler=in_order(ROWS, size)
    ),
}
PARTS = {
    "half": lambda data, size: DataLoader(Subset(Pairs(data), range(5)), batch_size=size),
    "sampled": lambda data, size: DataLoader(
        Pairs(data), batch_size=size, sampler=SubsetRandomSampler(range(5))
    ),
}
# N cannot be known of these.
UNSIZED = {
    "stream": lambda data, size: DataLoader(Stream(data), batch_size=size),
    "list": lambda data, size: cut(data, size),
    "own batches": lambda data, size: DataLoader(cut(data, size), batch_size=None),
    "some batches": lambda data, size: DataLoader(
        Pairs(data), batch_sampler=in_order(ROWS, size)[1:]
    ),
    "several": lambda data, size: [DataLoader(column, batch_size=size) for column in data],
}
WEIGHTED = {
    "weighted": lambda data, size: DataLoader(
        Pairs(data), batch_size=size, sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)
    ),
}
COUNTED = {*SIZED, *PARTS, *WEIGHTED} - {"batches"}
FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "limit_train_batches": st.sampled_from([1, 2, 0.5, 1.0, 100]),
        "accumulate_grad_batches": st.sampled_from([1, 2]),
    },
)


@st.composite
def fits(draw):
    kinds = {**SIZED, **PARTS, **UNSIZED, **WEIGHTED}
    kind = draw(st.sampled_from(sorted(kinds)))
    how = {}
    if kind in SIZED and kind != "batches":
        how = {"shuffle": draw(st.booleans()), "drop_last": draw(st.booleans())}
    size = draw(st.integers(1, ROWS + 1))
    data = draw(columns())
    stated = draw(st.one_of(st.none(), st.none(), st.integers(1, 40), JUNK))
    where = draw(st.sampled_from(["module", "datamodule"]))
    return kind, partial(kinds[kind], data, size, **how), stated, where, draw(FLAGS)


def is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@examples(100)
@given(fits())
def test_fits(drawn):
    kind, make, stated, where, flags = drawn

    def run():
        torch.manual_seed(0)
        still, seen = partial(torch.optim.SGD, lr=0.0), Seen()
        said = {"dataset_size": stated} if where == "module" else {}
        svi = PyroSVIModule(model, POINT, optimizer=still, **said)
        loader = make()
        if where == "datamodule" and not isinstance(loader, ArrayDataModule) and stated is not None:
            loader = Data(loader, stated)
        feed = "datamodule" if isinstance(loader, LightningDataModule) else "train_dataloaders"
        trainer = quiet_trainer(max_epochs=1, callbacks=[seen], **flags)
        trainer.fit(svi, **{feed: loader})
        return svi, seen, trainer

    try:
        found = result_or_named(
            run, "dataset_size", "batch", "array", "Sampler", "drop_last", "N = ", "rows"
        )
    except MisconfigurationException as error:
        # Lightning takes no half of one batch, nor of a loader without a length.
        assert flags.get("limit_train_batches") == 0.5 and "limit_train_batches" in str(error)
        return
    if found is None:
        return
    svi, seen, trainer = found[0]
    x, y = seen.rows()
    told = stated is not None and not (where == "datamodule" and "arrays" in kind)
    size = int(stated) if told else 5 if kind in PARTS else ROWS
    assert svi.dataset_size == size
    exact = AT - size * float((x * (y - AT * x)).mean())
    if kind in COUNTED:
        weight = 1.0
    else:  # how many rows batches hold is not known, and the first stands for all
        weight = len(x) / len(seen.batches) / len(seen.batches[0][0])
    accumulated = flags.get("accumulate_grad_batches", 1)
    mean = sum(seen.gradients) * accumulated / len(seen.batches)
    assert mean == pytest.approx(weight * exact, rel=1e-4)
    loss = 0.5 * AT**2 + HALF_LOG + size * float((0.5 * (y - AT * x) ** 2 + HALF_LOG).mean())
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(loss, rel=1e-4)
