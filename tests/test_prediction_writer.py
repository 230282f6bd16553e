"""Stored predictions are those that the Trainer returns, in the order of the rows."""

import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from support import quiet_trainer
from torch.utils.data import DataLoader, IterableDataset

from pyro_lightning import (
    ArrayDataModule,
    IndexedDataset,
    Prediction,
    PredictionWriter,
    PyroSVIModule,
)

pytest.importorskip("xarray", reason="the extra `predict` is not installed")

shuffled = pytest.mark.filterwarnings("ignore:Your `predict_dataloader`'s sampler has shuffling")

N, S = 23, 6
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))


def model(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.deterministic("level", mu + x[..., 0])
        pyro.sample("x", dist.Normal(mu, 1.0).expand(x.shape[-1:]).to_event(1), obs=x)


def module(**settings):
    svi = PyroSVIModule(model, dataset_size=N, prediction=Prediction(S, seed=1, **settings))
    svi.loss(X)
    return svi


def predicted(svi, loaders, folder, format="zarr", **options):
    """Predict with a writer; returns what the Trainer kept, joined by site."""
    writer = PredictionWriter(folder, format, **options)
    found = quiet_trainer(callbacks=[writer]).predict(svi, loaders)
    return {name: torch.cat([each[name] for each in found], 1).numpy() for name in found[0]}


@pytest.mark.parametrize("format", ["zarr", "netcdf"])
def test_what_is_stored_is_what_is_returned(tmp_path, format):
    kept = predicted(module(), DataLoader(X, batch_size=5), tmp_path, format)
    stored = PredictionWriter.open(tmp_path)
    assert stored["x"].dims == ("draw", "row", "x_dim_0")
    assert stored["level"].dims == ("draw", "row")
    assert stored["x"].dtype == np.float32
    assert (stored["row"].values == np.arange(N)).all()
    for name, values in kept.items():
        assert np.array_equal(stored[name].values, values)
    stored.close()


@shuffled
@pytest.mark.parametrize("format", ["zarr", "netcdf"])
def test_rows_in_another_order_are_put_in_theirs(tmp_path, format):
    torch.manual_seed(0)
    svi = module(sites="level")
    kept = predicted(svi, DataLoader(X, batch_size=5, shuffle=True), tmp_path, format)["level"]
    assert not np.allclose(kept[0] - kept[0, 0], X[:, 0] - X[0, 0], atol=1e-5)
    stored = PredictionWriter.open(tmp_path)["level"]
    assert (stored["row"].values == np.arange(N)).all()
    np.testing.assert_allclose(stored[0] - stored[0, 0], X[:, 0] - X[0, 0], atol=1e-5)


@shuffled
@pytest.mark.parametrize("loader", ["predict", "train"])
def test_rows_of_an_array_datamodule_have_their_numbers(tmp_path, loader):
    data = ArrayDataModule(X, batch_size=5, predict=X)
    loaders = data.predict_dataloader() if loader == "predict" else data.train_dataloader()
    predicted(module(sites="level"), loaders, tmp_path)
    level = PredictionWriter.open(tmp_path)["level"]
    np.testing.assert_allclose(level[0] - level[0, 0], X[:, 0] - X[0, 0], atol=1e-5)


def test_rows_of_a_subset_have_the_numbers_of_the_whole(tmp_path):
    chosen = torch.utils.data.Subset(IndexedDataset(X), [20, 3, 7])
    predicted(module(sites="level"), DataLoader(chosen, batch_size=2), tmp_path)
    level = PredictionWriter.open(tmp_path)["level"]
    assert level["row"].values.tolist() == [3, 7, 20]
    np.testing.assert_allclose(level[0] - level[0, 0], X[[3, 7, 20], 0] - X[3, 0], atol=1e-5)


def test_a_summary_names_what_it_holds(tmp_path):
    svi = module(sites="x", summary=["mean", 0.05])
    kept = predicted(svi, DataLoader(X, batch_size=5), tmp_path)["x"]
    stored = PredictionWriter.open(tmp_path)["x"]
    assert stored.dims == ("statistic", "row", "x_dim_0")
    assert np.array_equal(stored.sel(statistic="0.05").values, kept[1])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


def test_rows_of_a_stream_are_counted(tmp_path):
    with pytest.warns(UserWarning, match="Couldn't infer the batch indices"):
        kept = predicted(module(), DataLoader(Stream(), batch_size=5), tmp_path)
    stored = PredictionWriter.open(tmp_path)
    assert (stored["row"].values == np.arange(N)).all()
    assert np.array_equal(stored["x"].values, kept["x"])


def test_loaders_have_stores_of_their_own(tmp_path):
    loaders = [DataLoader(X[:9], batch_size=5), DataLoader(X[9:], batch_size=5)]
    quiet_trainer(callbacks=[PredictionWriter(tmp_path)]).predict(module(), loaders)
    sizes = [PredictionWriter.open(tmp_path, idx).sizes["row"] for idx in (0, 1)]
    assert sizes == [9, N - 9]


def test_nothing_is_returned_where_nothing_is_to_be_kept(tmp_path):
    trainer = quiet_trainer(callbacks=[PredictionWriter(tmp_path)])
    loader = DataLoader(X, batch_size=5)
    assert trainer.predict(module(), loader, return_predictions=False) is None
    assert PredictionWriter.open(tmp_path).sizes["row"] == N


@pytest.mark.parametrize("format", ["zarr", "netcdf"])
def test_sites_may_have_any_name_but_that_of_a_dimension(tmp_path, format):
    names = {"scope/x": 0, "net.w": 1, "100%": 2, "two words": 3}

    def named(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            for name, number in names.items():
                pyro.deterministic(name, number + x + mu[..., None], event_dim=1)
            pyro.sample("x", dist.Normal(mu, 1.0).expand(x.shape[-1:]).to_event(1), obs=x)

    svi = PyroSVIModule(named, dataset_size=N, prediction=Prediction(S, parallel=False))
    svi.loss(X)
    kept = predicted(svi, DataLoader(X, batch_size=5), tmp_path, format)
    stored = PredictionWriter.open(tmp_path)
    assert set(stored.data_vars) == {*names, "x"}
    for name in names:
        assert np.array_equal(stored[name].values, kept[name])
        assert stored[name].dims == ("draw", "row", f"{name}_dim_0")


def test_a_site_of_the_name_of_a_dimension_is_refused(tmp_path):
    def named(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("row", dist.Normal(mu, 1.0), obs=x)

    svi = PyroSVIModule(named, dataset_size=N)
    svi.loss(X[:, 0])
    with pytest.raises(ValueError, match="site 'row' has the name of a dimension"):
        predicted(svi, DataLoader(X[:, 0]), tmp_path)


def test_the_progress_bar_tells_of_batches_that_are_stored(tmp_path, capsys):
    trainer = quiet_trainer(callbacks=[PredictionWriter(tmp_path)], enable_progress_bar=True)
    trainer.predict(module(), DataLoader(X, batch_size=5), return_predictions=False)
    assert "5/5" in capsys.readouterr().out


def test_predictions_are_overwritten_only_if_that_is_said(tmp_path):
    predicted(module(), DataLoader(X, batch_size=5), tmp_path)
    (tmp_path / "predictions-notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds predictions already .predictions-0-0.zarr"):
        predicted(module(), DataLoader(X, batch_size=5), tmp_path)
    predicted(module(), DataLoader(X[:7], batch_size=5), tmp_path, "netcdf", overwrite=True)
    assert PredictionWriter.open(tmp_path).sizes["row"] == 7
    assert (tmp_path / "predictions-notes.txt").read_text() == "mine"


def test_a_folder_without_predictions_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no predictions of loader 0"):
        PredictionWriter.open(tmp_path)


def test_other_predictions_than_tensors_by_site_are_refused(tmp_path):
    class Own(PyroSVIModule):
        model = staticmethod(model)

        def predict_step(self, batch, batch_idx):
            return [1]

    svi = Own(dataset_size=N)
    svi.loss(X)
    with pytest.raises(TypeError, match="stores tensors of shape .num_samples, B, ...*got .1."):
        predicted(svi, DataLoader(X), tmp_path)


@pytest.mark.parametrize(("format", "missing"), [("zarr", "zarr"), ("netcdf", "h5netcdf")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, format, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"need xarray and {missing}: pip .*\[predict\]"):
        PredictionWriter(tmp_path, format)


def test_a_format_that_is_not_served_is_refused(tmp_path):
    with pytest.raises(ValueError, match='format must be "zarr" or "netcdf"'):
        PredictionWriter(tmp_path, "csv")


# LightningCLI asks jsonargparse and torch for names that newer releases of theirs deprecate.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_writer_is_described_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pyro-lightning"])
    arguments = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "callbacks": {
                "class_path": "pyro_lightning.PredictionWriter",
                "init_args": {"folder": str(tmp_path), "format": "netcdf"},
            },
        }
    }
    options = {"save_config_callback": None, "seed_everything_default": False}
    cli = LightningCLI(BoringModel, run=False, args=arguments, **options)
    (writer,) = (each for each in cli.trainer.callbacks if isinstance(each, PredictionWriter))
    assert (writer.folder, writer.format) == (tmp_path, "netcdf")
