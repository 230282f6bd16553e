"""What ArrayDataModule feeds a Trainer: the same rows in the same order, however they get there."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from support import normal_mean, quiet_trainer, run_script
from torch.utils.data import DataLoader

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule
from pyro_lightning.arrays import ArrayDataset, Columns
from pyro_lightning.loader import RowLoader
from pyro_lightning.samplers import RowBatches, ShuffledRows

N, B = 103, 10
Y = torch.arange(N)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Watcher(LightningModule):
    """Keeps the batches that it is given, and trains nothing."""

    def __init__(self, steps_per_batch=1):
        super().__init__()
        self.steps_per_batch = steps_per_batch
        self.seen = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 0.0

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watched(data, steps_per_batch=1, **options):
    torch.manual_seed(7)
    module = Watcher(steps_per_batch)
    quiet_trainer(**{"max_epochs": 2, **options}).fit(module, datamodule=data)
    return module.seen


@pytest.mark.parametrize("shuffle", [True, "blocks", False])
@pytest.mark.parametrize("drop_last", [False, True])
def test_several_steps_at_once_get_the_rows_of_single_steps(shuffle, drop_last):
    def rows(steps):
        return watched(ArrayDataModule(Y, B, shuffle=shuffle, drop_last=drop_last), steps)

    one, four = rows(1), rows(4)
    assert torch.equal(torch.cat(one), torch.cat(four))
    full = [10] * 10 if drop_last else [*[10] * 10, 3]
    assert [len(batch) for batch in one] == 2 * full
    assert [len(batch) for batch in four] == 2 * [40, 40, sum(full) - 80]


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
def test_only_training_takes_several_steps_at_once():
    data = ArrayDataModule(Y, B, val=Y, test=Y, predict=Y)
    watched(data, 4)
    assert data.train_dataloader().batch_size == 4 * B
    for stage in ("val", "test", "predict"):
        assert getattr(data, f"{stage}_dataloader")().batch_size == B


def test_a_module_that_takes_one_step_starts_on_one_steps_rows():
    sizes = []

    class Counting(PyroSVIModule):
        def num_rows(self, batch):
            sizes.append(len(batch))
            return len(batch)

    svi = Counting(normal_mean)
    svi.steps_per_batch = 4
    quiet_trainer(max_epochs=0).fit(svi, datamodule=ArrayDataModule(Y / N, B))
    assert set(sizes) == {B}


@pytest.mark.parametrize("shuffle", [True, "blocks"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_epochs_are_the_same_with_any_number_of_workers(workers, shuffle):
    alone = watched(ArrayDataModule(Y, B, shuffle=shuffle))
    worked = watched(ArrayDataModule(Y, B, shuffle=shuffle, num_workers=workers))
    assert torch.equal(torch.cat(alone), torch.cat(worked))


@pytest.mark.parametrize("shuffle", [True, "blocks"])
def test_each_epoch_has_every_row_once_in_a_new_order(shuffle):
    first, second = torch.cat(watched(ArrayDataModule(Y, B, shuffle=shuffle))).split(N)
    assert first.sort().values.tolist() == second.sort().values.tolist() == Y.tolist()
    assert not torch.equal(first, second)
    again = torch.cat(watched(ArrayDataModule(Y, B, shuffle=shuffle)))
    assert torch.equal(again, torch.cat([first, second]))


def test_blocks_of_a_memmap_are_a_few_megabytes(tmp_path):
    array = np.memmap(tmp_path / "x", np.float32, "w+", shape=(400_000, 100))
    order = ArrayDataModule(array, B, shuffle="blocks").train_dataloader().sampler.order
    assert order.block == 2**22 // 400


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffl")
def test_overfitting_turns_shuffling_off():
    assert torch.equal(
        torch.cat(watched(ArrayDataModule(Y, B), overfit_batches=2)), Y[:20].repeat(2)
    )


class Writer(BasePredictionWriter):
    def __init__(self):
        super().__init__("epoch")

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.rows = batch_indices


def test_predictions_come_with_lists_of_their_rows():
    writer = Writer()
    data = ArrayDataModule(Y, B, predict=Y[:23])
    quiet_trainer(callbacks=[writer]).predict(Watcher(), datamodule=data)
    assert writer.rows == [[part.tolist() for part in torch.arange(23).split(B)]]


FORMS = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "transposed": lambda x: x.T.clone().T,
    "strided array": lambda x: x.repeat_interleave(2, 0).numpy()[::2],
    "reversed array": lambda x: np.ascontiguousarray(x.numpy()[::-1])[::-1],
    "bfloat16": lambda x: x.bfloat16(),
    "with gradient": lambda x: x.clone().requires_grad_(),
    "conjugate": lambda x: (x + 1j * x).conj(),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_memory_layout_are_the_rows_of_the_array(form):
    array = FORMS[form](torch.arange(60.0).reshape(20, 3))
    rows = np.array([7, 0, 19, 7])
    expected = torch.stack(
        [
            torch.as_tensor(np.array(array[r])) if isinstance(array, np.ndarray) else array[r]
            for r in rows
        ]
    )
    here, kept = Columns(array), Columns(array)
    kept.keep_on(CPU)
    for found in (here.cut(rows), kept.cut(rows), kept.cut(torch.from_numpy(rows))):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_an_array_in_any_layout_is_not_copied_whole():
    array = np.zeros((10**6, 4), np.float32)[::2]
    columns = Columns(array)
    tracemalloc.start()
    try:
        columns.cut(np.arange(10))
        assert tracemalloc.get_traced_memory()[1] < 10**5
    finally:
        tracemalloc.stop()


def test_a_pickled_data_set_holds_its_arrays_once():
    array = np.zeros((1000, 100))
    data = pickle.loads(pickle.dumps(ArrayDataset((array, np.zeros(1000)))))
    assert len(pickle.dumps(data)) < 1.1 * (array.nbytes + 8000)
    assert torch.equal(data.__getitems__([1, 2])[0], torch.zeros(2, 100, dtype=torch.float64))


def resident(dataset, device):
    """A loader of batches that are cut on a device."""
    dataset.columns.keep_on(device)
    batches = RowBatches(ShuffledRows(dataset), B, False, device=device)
    return RowLoader(dataset, batch_sampler=batches)


@pytest.mark.parametrize("rows", [None, np.arange(0, N, 2)])
@pytest.mark.parametrize("numbered", [False, True])
def test_batches_cut_on_a_device_are_those_of_the_arrays(rows, numbered):
    def batches(device):
        torch.manual_seed(4)
        dataset = ArrayDataset({"y": Y.numpy(), "z": -Y}, rows)
        dataset.row_numbers = numbered
        if device is not None:
            return list(resident(dataset, device))
        return list(RowLoader(dataset, batch_sampler=RowBatches(ShuffledRows(dataset), B, False)))

    for here, there in zip(batches(None), batches(CPU), strict=True):
        if numbered:
            assert isinstance(there, IndexedBatch)
            assert torch.equal(there.data["y"], there.rows)
            assert torch.equal(here.rows, there.rows)
            here, there = here.data, there.data
        assert torch.equal(here["y"], there["y"])
        assert torch.equal(there["z"], -there["y"])


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_on_the_cpu_arrays_stay_where_they_are(device, tmp_path):
    array = np.memmap(tmp_path / "y", np.int64, "w+", shape=(N,))
    array[:] = Y.numpy()
    data = ArrayDataModule(array, B, device=device)
    assert torch.equal(torch.cat(watched(data)), torch.cat(watched(ArrayDataModule(Y, B))))
    assert data.train_dataloader().dataset.columns.device is None


def test_what_was_kept_on_a_device_is_given_up():
    data = ArrayDataModule(Y, B)
    columns = data.train_dataloader().dataset.columns
    columns.keep_on(CPU)
    data.teardown("fit")
    assert columns.device is None
    assert torch.equal(columns.cut(np.array([3])), Y[3:4])


def test_types_that_torch_cannot_index_are_not_kept_on_a_device():
    columns = Columns({"y": np.zeros(3, np.float32), "count": np.zeros(3, np.uint16)})
    with pytest.raises(TypeError, match="array 'count' has dtype uint16"):
        columns.keep_on(CPU)
    assert columns.device is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_arrays_kept_on_the_gpu_give_the_same_batches(device):
    expected = watched(ArrayDataModule((Y.numpy(), -Y), B, val_split=0.2))
    data = ArrayDataModule((Y.numpy(), -Y), B, val_split=0.2, device=device)
    found = watched(data, accelerator="gpu")
    for (y, z), (there, other) in zip(expected, found, strict=True):
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), y)
        assert torch.equal(other.cpu(), z)


@pytest.mark.gpu
@needs_gpu
def test_arrays_larger_than_a_quarter_of_the_gpu_stay_on_the_cpu(tmp_path):
    free = torch.cuda.mem_get_info()[0]
    array = np.memmap(tmp_path / "x", np.float32, "w+", shape=(free // 12,))  # a sparse file
    data = ArrayDataModule(array, B, device="auto")
    watched(data, accelerator="gpu", max_steps=3, max_epochs=-1)
    assert data.train_dataloader().dataset.columns.device is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_copied_ahead_to_the_gpu_are_the_same(workers):
    expected = watched(ArrayDataModule((Y, -Y), B))
    data = ArrayDataModule((Y, -Y), B, num_workers=workers)
    found = watched(data, accelerator="gpu")
    for (y, z), (there, other) in zip(expected, found, strict=True):
        assert there.device.type == "cuda"
        assert torch.equal(there.cpu(), y)
        assert torch.equal(other.cpu(), z)


@pytest.mark.gpu
@needs_gpu
def test_memory_of_the_gpu_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for rows in (10**5, 10**6, 10**7):
        x = np.memmap(tmp_path / f"{rows}", np.float32, "w+", shape=(rows,))  # a sparse file
        torch.cuda.reset_peak_memory_stats()
        svi = PyroSVIModule(normal_mean)
        trainer = quiet_trainer(accelerator="gpu", max_steps=50, max_epochs=-1)
        trainer.fit(svi, datamodule=ArrayDataModule(x, 1000))
        peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks) - min(peaks) < 2**20  # 10^7 rows are 40 MB


def test_an_unknown_shuffle_is_refused():
    with pytest.raises(ValueError, match="shuffle must be True, False or \"blocks\", got 'rows'"):
        ArrayDataModule(Y, B, shuffle="rows")


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    return run_script("ddp_feeding.py", tmp_path_factory.mktemp("feeding"))


@pytest.mark.parametrize("shuffle", ["True", "False", "blocks"])
def test_two_processes_share_the_rows_of_each_epoch(shuffle, shares):
    (first, second), (third, fourth) = shares[shuffle]  # by epoch, then by rank
    assert sorted(first + second) == sorted(third + fourth) == list(range(100))
    assert (first != third) is (shuffle != "False")
    if shuffle == "False":
        assert (first, second) == (list(range(0, 100, 2)), list(range(1, 100, 2)))


def test_a_loader_that_was_made_before_the_trainer_is_shared_out_by_lightning(shares):
    (first, second), _ = shares["outside"]
    assert sorted(first + second) == list(range(100))


def test_a_trainer_that_shares_nothing_out_gives_each_process_all_rows(shares):
    (first, second), _ = shares["unshared"]
    assert sorted(first) == sorted(second) == list(range(100))


def test_a_data_loader_is_what_it_was():
    loader = ArrayDataModule(Y, B).train_dataloader()
    assert isinstance(loader, DataLoader)
    assert len(loader) == 11
