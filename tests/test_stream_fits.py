"""Fits from shards on disk: each row once an epoch, N, and going on in the middle of an epoch."""

import pytest
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from stream_support import (
    B,
    N,
    RowsSeen,
    SavedAt,
    lit_loader,
    mean_of,
    quiet,
    web_loader,
)
from support import no_validation, quiet_trainer, run_script

from pyro_lightning import PyroSVIModule

pytestmark = [*quiet, no_validation]
ROWS = list(range(N))


class Streams(LightningDataModule):
    """A datamodule of the user's own; says N if told to."""

    def __init__(self, make, dataset_size=None):
        super().__init__()
        self.make = make
        if dataset_size is not None:
            self.dataset_size = dataset_size

    def train_dataloader(self):
        return self.make()


@pytest.fixture(scope="module")
def worked(shards):
    """Fits whose rows two workers read."""
    return run_script("stream_workers_fit.py", shards)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_of_litdata_trains_once_an_epoch(shuffle, shards):
    svi, seen = PyroSVIModule(mean_of), RowsSeen()
    trainer = quiet_trainer(max_epochs=2, callbacks=[seen])
    trainer.fit(svi, lit_loader(shards, shuffle=shuffle))
    assert seen.rows() == [ROWS, ROWS]
    assert svi.dataset_size == N
    assert (seen.epochs[0] != seen.epochs[1]) is shuffle


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_row_of_litdata_in_workers_trains_once_an_epoch(shuffle, worked):
    found = worked[f"litdata, {shuffle}"]
    assert found["rows"] == [ROWS, ROWS]
    assert found["dataset_size"] == N
    assert (found["epochs"]["0"] != found["epochs"]["1"]) is shuffle


def test_every_row_of_webdataset_trains_once_an_epoch(shards):
    svi, seen = PyroSVIModule(mean_of, dataset_size=N), RowsSeen()
    trainer = quiet_trainer(max_epochs=2, callbacks=[seen])
    trainer.fit(svi, web_loader(shards, shuffle=True))
    assert seen.rows() == [ROWS, ROWS]


def test_every_row_of_webdataset_in_workers_trains_once_an_epoch(worked):
    assert worked["webdataset"]["rows"] == [ROWS, ROWS]


def test_every_row_of_a_webloader_trains_once_an_epoch(worked):
    assert worked["webloader"]["rows"] == [ROWS]


def test_size_is_the_number_of_rows_that_workers_visit(worked):
    assert worked["size"] == N
    assert sorted(worked["visited"]) == ROWS


@pytest.mark.parametrize(
    ("make", "argument", "attribute"),
    [(lit_loader, None, None), (web_loader, None, N), (web_loader, N, None)],
    ids=["litdata", "an attribute", "an argument"],
)
def test_a_datamodule_of_the_users_own_needs_nothing_but_n(make, argument, attribute, shards):
    svi, seen = PyroSVIModule(mean_of, dataset_size=argument), RowsSeen()
    data = Streams(lambda: make(shards), attribute)
    quiet_trainer(max_epochs=1, callbacks=[seen]).fit(svi, datamodule=data)
    assert svi.dataset_size == N
    assert seen.rows() == [ROWS]


def test_a_smaller_last_batch_weighs_less(shards):
    svi, weights = PyroSVIModule(mean_of), []
    svi.on_train_batch_end = lambda outputs, batch, index: weights.append(svi.batch_weight(batch))
    quiet_trainer(max_epochs=1).fit(svi, lit_loader(shards, rows=slice(103)))
    assert weights == [1.0, 1.0, 3 / B]


def test_a_data_set_made_where_there_were_other_processes_is_refused(monkeypatch, shards):
    monkeypatch.setenv("WORLD_SIZE", "2")
    early = lit_loader(shards)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="rank 0 of 2, but this is rank 0 of 1.*Make it in setup"):
        quiet_trainer(max_epochs=1).fit(PyroSVIModule(mean_of, dataset_size=N), early)


@pytest.mark.parametrize(
    "several",
    [list, lambda pair: dict(zip("ab", pair, strict=True)), CombinedLoader],
    ids=["list", "dict", "CombinedLoader"],
)
def test_each_of_several_data_sets_is_looked_at(several, monkeypatch, shards):
    here = lit_loader(shards)
    monkeypatch.setenv("WORLD_SIZE", "2")
    pair = [here, lit_loader(shards)]
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="rank 0 of 2, but this is rank 0 of 1.*Make it in setup"):
        quiet_trainer(max_epochs=1).fit(PyroSVIModule(mean_of, dataset_size=N), several(pair))


def test_a_fit_goes_on_in_the_middle_of_an_epoch_of_litdata(shards, tmp_path):
    # Lightning keeps the loader's state in the checkpoint; the rows before it do not come again.
    first, path = RowsSeen(), tmp_path / "step-27.ckpt"
    trainer = quiet_trainer(max_epochs=2, callbacks=[first, SavedAt(27, path)])
    trainer.fit(PyroSVIModule(mean_of), lit_loader(shards, shuffle=True))
    rest = RowsSeen()
    trainer = quiet_trainer(max_epochs=3, callbacks=[rest])
    trainer.fit(PyroSVIModule(mean_of), lit_loader(shards, shuffle=True), ckpt_path=path)
    assert rest.epochs[1] == first.epochs[1][7:]
    assert rest.rows()[1] == ROWS
    assert trainer.global_step == 60


def test_workers_go_on_in_the_middle_of_an_epoch_of_litdata(worked):
    first, rest = worked["first"], worked["rest"]
    assert rest["epochs"]["1"] == first["epochs"]["1"][7:]
    assert rest["rows"][1] == ROWS
    assert rest["steps"] == 60
