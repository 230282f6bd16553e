"""What goes wrong in a batch is an error that names the batch, its rows and what is odd in it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from support import no_validation, normal_mean, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, random_split

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule
from pyro_lightning.row_numbers import numbers_of_rows

pytestmark = [no_validation, pytest.mark.filterwarnings("ignore:Encountered NaN")]

N, B, BAD = 40, 8, 13  # row 13 is row 5 of batch 1, where rows come in order
SECOND = r"training batch 1 of epoch 0 \(8 rows, 8 to 15 of the data set"


def rows(bad=(BAD,), value=float("nan"), count=N):
    x = torch.linspace(-1.0, 1.0, count)
    x[list(bad)] = value
    return x


def fit(data, model=normal_mean, epochs=1, **options):
    svi = PyroSVIModule(model, **options)
    given = {"datamodule" if isinstance(data, ArrayDataModule) else "train_dataloaders": data}
    quiet_trainer(max_epochs=epochs).fit(svi, **given)
    return svi


class Odd(Dataset):
    """Zeros, but for what a function makes of one row."""

    def __init__(self, make, bad=(BAD,)):
        self.make, self.bad = make, bad

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.make() if index in self.bad else torch.zeros(())


def raises(error):
    def make():
        raise error

    return make


# -- rows that are not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_batch_and_row_of_a_loader_in_order(value):
    match = SECOND + r"; at fault: 13 of the data set\): .*argument 0 .* in rows 5 of the batch"
    with pytest.raises(ValueError, match=match):
        fit(DataLoader(rows(value=value), batch_size=B))


@pytest.mark.parametrize("shuffle", [True, "blocks", False])
@pytest.mark.parametrize("workers", [0, 1])
def test_row_of_arrays_in_any_order(shuffle, workers):
    torch.manual_seed(1)
    data = ArrayDataModule(rows(), batch_size=B, shuffle=shuffle, num_workers=workers)
    with pytest.raises(ValueError, match=r"training batch \d of .*at fault: 13 of the data set"):
        fit(data)


def test_row_of_arrays_of_which_some_are_held_out():
    # Row 13 is neither held out nor among the first 8, which set-up would meet.
    data = ArrayDataModule(rows(), batch_size=B, val_split=0.1, seed=2)
    match = r"training batch \d of epoch 0 \(.*at fault: 13 of the data set"
    with pytest.raises(ValueError, match=match):
        fit(data)


def test_row_of_an_indexed_data_set():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="at fault: 13 of the data set"):
        fit(DataLoader(IndexedDataset(TensorDataset(rows())), batch_size=B, shuffle=True))


def test_row_of_a_part_of_a_data_set():
    kept = torch.utils.data.Subset(TensorDataset(rows()), range(N - 1, -1, -1))
    match = r"batch 3 of .*8 rows, 15, 14, 13, 12, .*at fault: 13 of the data set"
    with pytest.raises(ValueError, match=match):
        fit(DataLoader(kept, batch_size=B))


def test_rows_without_numbers_are_those_of_the_batch():
    torch.manual_seed(0)
    match = r"batch \d of epoch 0 \(8 rows\): .*in rows \d of the batch.*IndexedDataset gives rows"
    with pytest.raises(ValueError, match=match):
        fit(DataLoader(rows(), batch_size=B, shuffle=True))


def test_mini_batch_of_several_in_a_batch():
    match = r"batch 0 of .*16 rows, 0 to 15 .*fault: 13 of .*mini-batch 3 of it \(its rows 12 to 15"
    with pytest.raises(ValueError, match=match):
        fit(ArrayDataModule(rows(), batch_size=4, shuffle=False), steps_per_batch=4)


def test_rows_that_are_run_at_set_up():
    with pytest.raises(ValueError, match="the first rows of the data, .* set-up: .* in rows 3 of"):
        fit(DataLoader(rows(bad=[3]), batch_size=B))


def test_batch_of_a_later_epoch():
    x = rows(bad=[])

    class Spoils(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                x[BAD] = float("nan")

    trainer = quiet_trainer(max_epochs=4, callbacks=[Spoils()])
    with pytest.raises(ValueError, match="training batch 1 of epoch 2"):
        trainer.fit(PyroSVIModule(normal_mean), DataLoader(x, batch_size=B))


def test_no_numbers_for_rows_that_the_loader_does_not_hold_there():
    # As where an epoch that is resumed begins with other rows than those of its count.
    loader = DataLoader(rows(bad=[]), batch_size=B)
    assert numbers_of_rows(rows(bad=[])[8:16], loader, 1) == list(range(8, 16))
    assert numbers_of_rows(rows(bad=[])[8:16], loader, 3) is None


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_batch_of_an_evaluation(stage):
    svi = PyroSVIModule(normal_mean, dataset_size=N)
    name = "validation" if stage == "validate" else "test"
    match = rf"{name} batch 1 of loader 1 \(8 rows, 8 to 15 of the data set; at fault: 13 of"
    loaders = [DataLoader(rows(bad=[]), batch_size=B), DataLoader(rows(), batch_size=B)]
    with pytest.raises(ValueError, match=match):
        getattr(quiet_trainer(), stage)(svi, loaders)


# -- batches that a loader cannot make -------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error", [KeyError("y"), ValueError("no such row"), FileNotFoundError(2, "No such file", "x")]
)
def test_a_loader_that_raises(error, workers):
    loader = DataLoader(Odd(raises(error)), batch_size=B, num_workers=workers)
    match = r"training batch 1 of epoch 0 \(rows 8 to 15 of the data set\) could not be loaded"
    # The error itself is not kept: its traceback holds workers, which would be waited for.
    with pytest.raises(type(error), match=f"(?s){match}.*{error.args[-1]}"):
        fit(loader)


def test_a_loader_that_raises_tells_the_row_where_rows_have_numbers():
    data = IndexedDataset(Odd(raises(KeyError("y"))))
    torch.manual_seed(0)
    with pytest.raises(KeyError, match=r"batch \d of .* could not be loaded: row 13 of the data"):
        fit(DataLoader(data, batch_size=B, shuffle=True))


def test_a_data_set_of_whole_batches_that_raises_tells_the_rows():
    class Whole(TensorDataset):
        def __getitems__(self, indices):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="rows 3 to 5 of the data set: the disk is gone"):
        IndexedDataset(Whole(rows())).__getitems__([3, 4, 5])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_raises_what_ends_an_epoch(workers):
    loader = DataLoader(Odd(raises(StopIteration())), batch_size=B, num_workers=workers)
    match = r"batch 1 of epoch 0 \(rows 8 to 15 .* could not be loaded: .* raised StopIteration"
    with pytest.raises(RuntimeError, match=match):
        fit(loader)


class Stream(IterableDataset):
    def __init__(self, count=3):
        self.count = count

    def __iter__(self):
        for _ in range(self.count * B):
            yield torch.zeros(())
        raise OSError("connection lost")


def test_a_stream_that_raises():
    with pytest.raises(OSError, match=r"batch 3 of epoch 0 could not be loaded: connection lost"):
        fit(DataLoader(Stream(), batch_size=B), dataset_size=N)


def test_a_validation_loader_that_raises():
    val = DataLoader(Odd(raises(ValueError("no such row"))), batch_size=B)
    with pytest.raises(ValueError, match=r"validation batch 1 of epoch 0 \(rows 8 to 15"):
        quiet_trainer(max_epochs=1, num_sanity_val_steps=0).fit(
            PyroSVIModule(normal_mean), DataLoader(rows([]), batch_size=B), val
        )


class Picky(Exception):
    """An error that cannot be made from a message."""

    def __init__(self, code, row):
        super().__init__(f"code {code}")
        self.code, self.row = code, row


def test_an_error_of_a_class_of_its_own_stays_it():
    with pytest.raises(Picky) as caught:
        fit(DataLoader(Odd(raises(Picky(7, 13))), batch_size=B))
    assert (caught.value.code, caught.value.row) == (7, 13)
    told = [*caught.value.args, *getattr(caught.value, "__notes__", [])]
    assert any("training batch 1 of epoch 0" in str(each) for each in told)


# -- batches that are laid out otherwise -----------------------------------------------------------


class Parts(Dataset):
    """Rows whose batch 1 is another kind of thing."""

    def __init__(self, usual, odd):
        self.usual, self.odd = usual, odd

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.odd if index // B == 1 else self.usual


ZERO = torch.zeros(())
ODD = {
    "dtype": (ZERO, ZERO.double(), "batch is float64, and was float32"),
    "integers": (ZERO, ZERO.long(), "batch is int64, and was float32"),
    "dimensions": (ZERO, ZERO[None], "batch has 2 dimensions, and had 1"),
    "elements": ((ZERO, ZERO), (ZERO,), "batch has 1 elements, and had 2"),
    "field": ({"x": ZERO, "y": ZERO}, {"x": ZERO.double()}, r".*batch\['x'\] is float64"),
    "container": ({"x": ZERO}, (ZERO,), "batch is a sequence of 1 elements, and was a mapping"),
    "no tensor": ((ZERO, ZERO), (ZERO, "a"), r"batch\[1\] is a .*, and was a tensor of float32"),
}


def any_model(x, y=None):
    normal_mean(x)


@pytest.mark.parametrize("case", ODD)
def test_a_batch_of_another_layout(case):
    usual, odd, match = ODD[case]
    with pytest.raises(ValueError, match=rf"batch 1 of epoch 0 .*Unlike the first batch: {match}"):
        fit(DataLoader(Parts(usual, odd), batch_size=B), any_model)


def test_fields_that_a_model_does_without_may_be_left_out():
    for usual, odd in (
        ({"x": ZERO, "y": ZERO}, {"x": ZERO}),
        ({"x": ZERO}, {"x": ZERO, "y": ZERO}),
    ):
        fit(DataLoader(Parts(usual, odd), batch_size=B), any_model)


def test_a_field_that_the_model_needs_is_named_where_it_is_left_out():
    def needs(x, y):
        normal_mean(x + y)

    loader = DataLoader(Parts({"x": ZERO, "y": ZERO}, {"x": ZERO}), batch_size=B)
    with pytest.raises(TypeError, match=r"argument: 'y'.*Unlike the first batch: batch\['y'\] is"):
        fit(loader, needs)


def test_another_layout_may_be_meant():
    fit(DataLoader(Parts(ZERO, ZERO.double()), batch_size=B), checks=False)


def test_the_validation_may_have_a_layout_of_its_own():
    val = DataLoader(rows([]).double(), batch_size=B)
    svi = PyroSVIModule(normal_mean)
    quiet_trainer(max_epochs=1).fit(svi, DataLoader(rows([]), batch_size=B), val)


def test_sequences_as_long_as_the_longest_of_their_batch():
    def padded(items):
        length = max(items)
        return torch.stack([torch.arange(length) < item for item in items]).float()

    lengths = [1 if index // B == 1 else 1 + index % 5 for index in range(N)]

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).expand(x.shape[1:]).to_event(1), obs=x)

    fit(DataLoader(lengths, batch_size=B, collate_fn=padded), model)


def test_an_error_of_the_model_names_batch_and_what_is_odd():
    labels = torch.zeros(N, dtype=torch.long)
    labels[BAD] = 3

    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 1)

        def forward(self, label):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(label)):
                loc = self.table(label).squeeze(-1) + mu
                pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(len(label)))

    with pytest.raises(IndexError, match=SECOND + r"\): index out of range"):
        fit(DataLoader(labels, batch_size=B), Embeds())


def test_an_error_names_inputs_that_are_not_finite_and_rows_of_another_shape():
    def model(x):
        if x.shape[1] == 2:
            raise RuntimeError("two columns")
        normal_mean(x[:, 0])

    x = [torch.zeros(2 if index // B == 1 else 3) for index in range(N)]
    x[BAD][0] = float("nan")
    match = (
        r"(?s)batch 1 .*two columns.* Not finite: batch in rows 5 of the batch. "
        r"Unlike the first batch: "
        r"batch has rows of shape \(2,\), and had \(3,\)"
    )
    with pytest.raises(RuntimeError, match=match):
        fit(DataLoader(x, batch_size=B), model)


# -- without a Trainer -----------------------------------------------------------------------------


def columns(x, y):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(weight * x, 1.0), obs=y)


def test_rows_that_broadcast_are_refused_in_any_batch():
    svi = PyroSVIModule(columns, dataset_size=N)
    x = torch.linspace(-1, 1, B)
    svi.loss((x, x))
    with pytest.raises(ValueError, match=r"site 'y' .*\(8, 8\).* broadcast to \(B, B\)"):
        svi.loss((x, x[:, None]))


def test_a_refused_batch_leaves_the_module_as_it_was():
    svi, other = (PyroSVIModule(columns, dataset_size=N) for _ in range(2))
    x = torch.linspace(-1, 1, B)
    for each in (svi, other):
        torch.manual_seed(0)
        each.loss((x, x))
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="broadcast"):
        svi.loss((x, x[:, None]))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    found = svi.loss((x, x))
    torch.manual_seed(1)
    assert found == other.loss((x, x))


def test_random_split_of_an_indexed_data_set_names_rows_of_the_whole():
    train, _ = random_split(
        IndexedDataset(TensorDataset(rows(bad=[BAD]))),
        [32, 8],
        generator=torch.Generator().manual_seed(3),
    )
    assert BAD in train.indices[8:]  # neither held out nor met at set-up
    with pytest.raises(ValueError, match="at fault: 13 of the data set"):
        fit(DataLoader(train, batch_size=B))
