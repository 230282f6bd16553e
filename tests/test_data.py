"""ArrayDataModule: which rows each stage gets, and how a batch is cut."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from support import normal_mean, quiet_trainer
from torch.utils.data import DataLoader

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.arrays import ArrayDataset

N = 23
X = torch.arange(N * 2.0).reshape(N, 2)
Y = torch.arange(N)

STAGES = ("train", "val", "test", "predict")


def batches(data, stage="train"):
    return list(getattr(data, f"{stage}_dataloader")())


def numbers(data, stage):
    """Row numbers that a stage gives, where the data are Y."""
    return torch.cat(batches(data, stage)).tolist()


def has(data, stage):
    """Whether Lightning would run this stage."""
    return is_overridden(f"{stage}_dataloader", data)


KINDS = {
    "tensor": lambda a, tmp: a,
    "array": lambda a, tmp: a.numpy(),
    "memmap": lambda a, tmp: on_disk(a.numpy(), tmp),
}


def on_disk(array, folder, mode="r"):
    path = folder / f"{array.dtype}{array.ndim}.bin"
    array.tofile(path)
    return np.memmap(path, dtype=array.dtype, mode=mode, shape=array.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["single", "tuple", "list", "dict"])
def test_batches_have_the_form_and_the_rows_of_the_arrays(kind, form, tmp_path):
    x, y = (KINDS[kind](a, tmp_path) for a in (X, Y))
    arrays = {"single": x, "tuple": (x, y), "list": [x, y], "dict": {"x": x, "y": y}}[form]
    for batch, rows in zip(
        batches(ArrayDataModule(arrays, 5, shuffle=False)), Y.split(5), strict=True
    ):
        if form == "single":
            got_x, got_y = batch, rows
        elif form == "dict":
            assert isinstance(batch, dict)
            got_x, got_y = batch["x"], batch["y"]
        else:
            assert isinstance(batch, tuple)
            got_x, got_y = batch
        assert torch.equal(got_x, X[rows])
        assert torch.equal(got_y, rows)


DTYPES = ["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", "complex64"]


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("dtype", [*DTYPES, "uint16"])
def test_dtypes_are_kept(dtype, kind):
    array = (np.arange(N) % 2).astype(dtype)
    arrays = torch.from_numpy(array) if kind == "tensor" else array
    if dtype == "uint16" and kind == "tensor" and not indexes(arrays):
        pytest.skip("this torch cannot index a tensor of uint16")
    for batch in batches(ArrayDataModule(arrays, 10, shuffle=False)):
        assert batch.dtype == getattr(torch, dtype)
        assert batch[:2].tolist() == [0, 1]


def indexes(tensor):
    try:
        tensor[torch.tensor([0])]
    except (RuntimeError, NotImplementedError):
        return False
    return True


class Recorder(np.ndarray):
    """An array that keeps how many elements each access gave, and refuses to be read whole."""

    calls: list[int]

    def __array_finalize__(self, parent):
        self.calls = getattr(parent, "calls", [])

    def __getitem__(self, index):
        rows = super().__getitem__(index)
        self.calls.append(len(rows) if np.ndim(index) else 1)
        return np.asarray(rows)

    def __array__(self, *args, **kwargs):
        raise AssertionError("the whole array is read")


class RecordingMemmap(Recorder, np.memmap):
    pass


def recorded(folder):
    path = folder / "rows.bin"
    X.numpy().tofile(path)
    array = RecordingMemmap(path, dtype="float32", mode="r", shape=tuple(X.shape))
    array.calls = []
    return array


@pytest.mark.parametrize("split", [0.0, 0.3])
def test_a_memmap_is_read_by_one_index_operation_a_batch(split, tmp_path):
    array = recorded(tmp_path)
    data = ArrayDataModule(array, 5, val_split=split)
    assert array.calls == []
    sizes = [len(batch) for batch in batches(data)]
    assert array.calls == sizes
    assert max(sizes) == 5
    assert sum(sizes) == data.dataset_size


def test_a_fit_reads_a_memmap_batch_by_batch(tmp_path):
    array = recorded(tmp_path)
    data = ArrayDataModule(array, 5)
    svi = PyroSVIModule(lambda x: normal_mean(x[:, 0]))
    quiet_trainer(max_epochs=1).fit(svi, datamodule=data)
    assert sorted(array.calls) == [3, 5, 5, 5, 5, 5]  # one batch more for the set-up


def test_a_read_only_memmap_gives_writable_batches_without_warning(tmp_path):
    array = on_disk(X.numpy(), tmp_path)
    assert not array.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(ArrayDataModule(array, 5, shuffle=False)):
            batch.zero_()
    assert np.array_equal(array, X.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_rows_are_copies(kind, tmp_path):
    array = KINDS[kind](X.clone(), tmp_path)
    data = ArrayDataModule(array, 5)
    for batch in batches(data):
        batch.zero_()
    row = data.train_dataloader().dataset[3]
    assert torch.equal(row, X[3])
    row.zero_()
    left = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
    assert torch.equal(left, X)


def test_torchs_fetcher_asks_for_a_batch_once(monkeypatch):
    asked = []
    original = ArrayDataset.__getitems__

    def counting(self, indices):
        asked.append(len(indices))
        return original(self, indices)

    monkeypatch.setattr(ArrayDataset, "__getitems__", counting)
    monkeypatch.delattr(ArrayDataset, "__getitem__")
    assert len(batches(ArrayDataModule((X, Y), 5))) == 5
    assert asked == [5, 5, 5, 5, 3]


def test_every_row_trains_unless_told_otherwise():
    data = ArrayDataModule(Y, 5)
    assert sorted(numbers(data, "train")) == Y.tolist()
    assert data.dataset_size == N
    assert not any(has(data, stage) for stage in STAGES[1:])


def test_training_rows_come_shuffled_and_others_in_order():
    data = ArrayDataModule(Y, 5, val_split=0.3, test_split=0.2)
    torch.manual_seed(0)
    one, other = numbers(data, "train"), numbers(data, "train")
    assert one != other
    assert sorted(one) == sorted(other)
    for stage in ("val", "test"):
        assert numbers(data, stage) == sorted(numbers(data, stage))
    assert numbers(ArrayDataModule(Y, 5, shuffle=False), "train") == Y.tolist()


def test_fractions_split_the_rows_without_overlap_or_loss():
    data = ArrayDataModule(Y, 5, val_split=0.3, test_split=0.2)
    parts = [numbers(data, stage) for stage in STAGES[:3]]
    assert sorted(sum(parts, [])) == Y.tolist()
    assert [len(part) for part in parts] == [11, 7, 5]
    assert data.dataset_size == 11


def test_the_split_depends_on_its_seed_alone():
    def held_out(seed):
        return numbers(ArrayDataModule(Y, 5, val_split=0.3, seed=seed), "val")

    torch.manual_seed(1)
    np.random.seed(1)
    first = held_out(0)
    np.random.seed(2)
    assert held_out(0) == first != held_out(1)
    before = torch.get_rng_state(), np.random.get_state()[2]
    ArrayDataModule(Y, 5, val_split=0.3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[2] == before[1]


def test_arrays_given_for_a_stage_leave_every_row_to_training():
    data = ArrayDataModule(Y, 5, val=Y + 100, test=Y[:4] + 200, predict=Y[:7] + 300)
    assert numbers(data, "val") == (Y + 100).tolist()
    assert numbers(data, "test") == [200, 201, 202, 203]
    assert numbers(data, "predict") == list(range(300, 307))
    assert sorted(numbers(data, "train")) == Y.tolist()
    assert data.dataset_size == N


def test_a_loader_of_a_subclass_serves_a_stage_without_arrays():
    class Own(ArrayDataModule):
        def val_dataloader(self):
            return DataLoader(torch.ones(6), batch_size=3)

    data, seen = Own(torch.zeros(4), batch_size=2), []
    svi = PyroSVIModule(normal_mean)
    svi.on_validation_batch_start = lambda batch, *_: seen.append(batch)
    quiet_trainer(max_epochs=1, num_sanity_val_steps=0).fit(svi, datamodule=data)
    assert torch.equal(torch.cat(seen), torch.ones(6))


def test_a_subclass_is_told_which_stage_has_no_rows():
    class Wrapped(ArrayDataModule):
        def test_dataloader(self):
            return super().test_dataloader()

    with pytest.raises(ValueError, match="no rows for that stage"):
        Wrapped(torch.zeros(4), batch_size=2).test_dataloader()


def test_drop_last_leaves_rows_out_of_training_alone_and_n_as_it_is():
    data = ArrayDataModule(Y, 5, val=Y, drop_last=True)
    assert [len(batch) for batch in batches(data)] == [5] * 4
    assert len(numbers(data, "val")) == N
    assert data.dataset_size == N


@pytest.mark.parametrize("kind", KINDS)
def test_workers_give_the_same_batches(kind, tmp_path):
    array = KINDS[kind](X, tmp_path)

    def epoch(workers):
        torch.manual_seed(3)
        data = ArrayDataModule(array, 5, val_split=0.3, num_workers=workers)
        return [*batches(data, "train"), *batches(data, "val")]

    for alone, worked in zip(epoch(0), epoch(2), strict=True):
        assert torch.equal(alone, worked)


def test_a_pickled_datamodule_gives_the_same_rows_and_stages():
    data = pickle.loads(pickle.dumps(ArrayDataModule(Y, 5, val_split=0.3)))
    assert numbers(data, "val") == numbers(ArrayDataModule(Y, 5, val_split=0.3), "val")
    assert has(data, "val")
    assert not has(data, "test")


def test_pinning_is_chosen_for_the_device_unless_told():
    assert ArrayDataModule(Y, 5).train_dataloader().pin_memory is torch.cuda.is_available()
    for chosen in (True, False):
        data = ArrayDataModule(Y, 5, pin_memory=chosen)
        assert data.train_dataloader().pin_memory is chosen


def many(count):
    return np.arange(count)


REFUSED = [
    (ValueError, "same number of rows, got {0: 3, 1: 4}", ((many(3), many(4)),), {}),
    (ValueError, r"same number of rows, got {'x': 3, 'y': 4}", ({"x": many(3), "y": many(4)},), {}),
    (ValueError, "at least one array", ((),), {}),
    (ValueError, "at least one array", ({},), {}),
    (ValueError, "no rows", (many(0),), {}),
    (ValueError, "no rows", (many(4),), {"val": many(0)}),
    (ValueError, "array 0 has no row dimension", (np.array(3.0),), {}),
    (ValueError, "array 1 has no row dimension", ((many(3), torch.tensor(3.0)),), {}),
    (TypeError, "array 0 has dtype object", (np.array(["a", 1], dtype=object),), {}),
    (TypeError, "array 'x' has dtype <U1", ({"x": np.array(["a", "b"])},), {}),
    (TypeError, "array 0 has dtype datetime64", (many(3).astype("datetime64[s]"),), {}),
    (TypeError, "array 0 must be a tensor or NumPy array, got int", ([1, 2, 3],), {}),
    (TypeError, "array 0 must be a tensor or NumPy array, got list", ([[1.0], [2.0]],), {}),
    (ValueError, "batch_size must be at least 1, got 0", (many(3), 0), {}),
    (ValueError, "batch_size must be at least 1, got -2", (many(3), -2), {}),
    (ValueError, "val_split=0.01 of 10 rows leaves nothing", (many(10),), {"val_split": 0.01}),
    (ValueError, "test_split=0.01 of 10 rows leaves nothing", (many(10),), {"test_split": 0.01}),
    (ValueError, r"val_split must lie in \[0, 1\), got 1", (many(10),), {"val_split": 1.0}),
    (ValueError, r"test_split must lie in \[0, 1\), got -0.1", (many(10),), {"test_split": -0.1}),
    (ValueError, r"val_split must lie in \[0, 1\), got nan", (many(10),), {"val_split": np.nan}),
    (ValueError, "leave none of 10 rows", (many(10),), {"val_split": 0.5, "test_split": 0.5}),
    (ValueError, "leave none of 10 rows", (many(10),), {"val_split": 0.99}),
    (TypeError, "array 0 is masked", (np.ma.array(np.ones(3)),), {}),
    (TypeError, "array 0 is sparse", (torch.ones(3).to_sparse(),), {}),
    (TypeError, "val: array 0 has dtype <U1", (many(3),), {"val": np.array(["a"])}),
    (TypeError, "batch_size must be a whole number, got '8'", (many(3), "8"), {}),
    (TypeError, "drop_last must be True or False, got 1", (many(3),), {"drop_last": 1}),
    (ValueError, 'shuffle must be True, False or "blocks", got 1', (many(3),), {"shuffle": 1}),
    (ValueError, 'device must be None, "auto" or a device', (many(3),), {"device": "gpu0"}),
    (ValueError, "val or val_split, not both", (many(10),), {"val_split": 0.5, "val": many(3)}),
]


@pytest.mark.parametrize("error, message, args, options", REFUSED)
def test_what_cannot_be_fed_is_refused_at_once(error, message, args, options):
    with pytest.raises(error, match=message):
        ArrayDataModule(*args, **options)
