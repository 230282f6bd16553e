"""Arrays that are given by the path of their file."""

import numpy as np
import pytest
import torch

from pyro_lightning import ArrayDataModule
from pyro_lightning.array_files import opened

X = np.arange(12.0).reshape(6, 2)


@pytest.fixture
def files(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "xy.npz", x=X, y=X[:, 0])
    return tmp_path


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_an_npy_file_is_mapped_and_not_read(files, kind):
    array = opened(kind(files / "x.npy"))
    assert isinstance(array, np.memmap) and (array == X).all()


def test_paths_and_arrays_go_together(files):
    found = opened({"x": files / "x.npy", "y": X[:, 1]})
    assert isinstance(found["x"], np.memmap) and found["y"] is not X
    first, second = opened([files / "x.npy", X])
    assert isinstance(first, np.memmap) and second is X


def test_an_npz_file_is_a_dict_of_its_arrays(files):
    found = opened(files / "xy.npz")
    assert list(found) == ["x", "y"] and (found["x"] == X).all() and (found["y"] == X[:, 0]).all()


def test_a_datamodule_takes_paths_in_all_its_parts(files):
    data = ArrayDataModule(files / "xy.npz", 6, val=str(files / "xy.npz"), shuffle=False)
    assert data.dataset_size == 6
    for loader in (data.train_dataloader(), data.val_dataloader()):
        (batch,) = list(loader)
        assert torch.equal(batch["x"], torch.from_numpy(X))


@pytest.mark.parametrize("arrays", ["rows.csv", ["xy.npz", "x.npy"]], ids=["csv", "npz"])
def test_other_files_are_refused_by_name(arrays):
    named = arrays if isinstance(arrays, str) else arrays[0]
    with pytest.raises(ValueError, match=rf"\.npy files.*{named}"):
        ArrayDataModule(arrays)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match="nothing.npy"):
        ArrayDataModule("nothing.npy")
