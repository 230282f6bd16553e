"""`trainer.predict`: joint draws over all batches, settings, checkpoints, repeated rows."""

import copy
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import LightningDataModule
from pyro.infer.autoguide import AutoNormal
from support import no_validation, normal_mean, quiet_trainer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SubsetRandomSampler

from pyro_lightning import ArrayDataModule, IndexedDataset, Prediction, PyroSVIModule
from pyro_lightning.prediction import summarised

N, S, SD = 200, 4000, 0.1
X = torch.linspace(-1, 1, N)


def mean_only(x):
    """Draws of the total of N rows are Normal with variance N + N^2 SD^2."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def known(model=mean_only, **options):
    """A module whose guide is N(2, SD)."""
    svi = PyroSVIModule(model, dataset_size=N, **options)
    svi.loss(X)
    svi.guide.locs.mu, svi.guide.scales.mu = torch.tensor(2.0), torch.tensor(SD)
    return svi


def loader(batches, data=X):
    return DataLoader(data, batch_size=-(-len(data) // batches))


def joined(predictions, site="x"):
    return torch.cat([each[site] for each in predictions], 1)


@pytest.mark.parametrize("batches", [1, 3, 50])
def test_a_total_over_the_data_set_has_the_same_sd_for_any_split(batches):
    svi = known(prediction=Prediction(num_samples=S, seed=3))
    draws = joined(quiet_trainer().predict(svi, loader(batches)))
    assert draws.shape == (S, N)
    total = draws.sum(1)
    sd = (N + (N * SD) ** 2) ** 0.5
    # The sd of 4000 draws has a relative standard error of 1.1 percent, the mean one of sd / 63.
    assert float(total.std()) == pytest.approx(sd, rel=0.05)
    assert float(total.mean()) == pytest.approx(2 * N, abs=5 * sd / S**0.5)
    # The rows of one draw share its mean: the correlation of two of them.
    assert float(draws[:, [0, -1]].T.corrcoef()[0, 1]) == pytest.approx(
        SD**2 / (1 + SD**2), abs=5 * S**-0.5
    )


def test_draws_of_different_rows_have_noise_of_their_own():
    svi = known(prediction={"num_samples": 10})
    draws = joined(quiet_trainer().predict(svi, loader(50)))
    # In single precision two of 2,000 may be equal. Noise that batches of 4 rows shared, or the
    # rows of one, would leave at most 500 values.
    assert len(draws.unique()) > 0.99 * 10 * N


def test_a_seed_gives_the_same_draws_and_leaves_random_states_alone():
    svi = known(prediction=Prediction(num_samples=5, seed=1))
    one = joined(quiet_trainer().predict(svi, loader(3)))
    torch.manual_seed(9)  # an iterator of torch's loader draws from it, the draws do not
    assert torch.equal(one, joined(quiet_trainer().predict(svi, loader(3))))
    state = torch.get_rng_state()
    svi.predict_step(X)
    assert torch.equal(state, torch.get_rng_state())
    svi.prediction = Prediction(num_samples=5, seed=2)
    assert not torch.equal(one, joined(quiet_trainer().predict(svi, loader(3))))


def test_without_a_seed_draws_follow_from_torchs_generator():
    svi = known(prediction=Prediction(num_samples=5))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(joined(quiet_trainer().predict(svi, loader(3))))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_summaries_are_those_of_the_draws():
    summary = ["mean", "sd", 0.05, 0.5, 1]
    draws = joined(quiet_trainer().predict(known(prediction=Prediction(50, seed=1)), loader(3)))
    svi = known(prediction=Prediction(50, seed=1, summary=summary))
    kept = joined(quiet_trainer().predict(svi, loader(3)))
    values = draws.numpy()
    expected = [
        values.mean(0),
        values.std(0, ddof=1),
        *np.quantile(values, [0.05, 0.5, 1.0], axis=0),
    ]
    torch.testing.assert_close(kept, torch.from_numpy(np.stack(expected)).float())
    assert svi.prediction.labels == ("mean", "sd", "0.05", "0.5", "1.0")


def test_summaries_of_counts_are_numbers():
    counts = torch.tensor([[0, 1], [3, 1]])
    assert summarised(counts, ["mean", 0.5]).tolist() == [[1.5, 1.0], [1.5, 1.0]]


def test_predictions_from_a_datamodule_need_no_observations():
    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x, 1e-3), obs=y)

    svi = PyroSVIModule(model, prediction=Prediction(20, sites="y"))
    data = ArrayDataModule((X, 0.5 * X), batch_size=50, predict=(X[:70],))
    quiet_trainer(max_epochs=1).fit(svi, datamodule=data)
    found = joined(quiet_trainer().predict(svi, datamodule=data), "y")
    assert found.shape == (20, 70)
    slopes = found[:, 0] / X[0]
    assert (found - slopes[:, None] * X[:70]).abs().max() < 0.02


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_predictions_are_made_in_the_precision_of_the_trainer(precision):
    svi = known(prediction=Prediction(5))
    draws = joined(quiet_trainer(precision=precision).predict(svi, loader(3)))
    assert draws.dtype == (torch.float64 if precision == "64-true" else torch.float32)


@no_validation
def test_a_module_from_a_checkpoint_predicts_without_data(tmp_path):
    trainer = quiet_trainer(max_epochs=1)
    svi = PyroSVIModule(normal_mean)
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=50))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    settings = Prediction(20, seed=4)
    loaded = PyroSVIModule.load_from_checkpoint(
        tmp_path / "fit.ckpt", model=normal_mean, prediction=settings
    )
    svi.prediction = settings
    new = X[:30] + 5
    one, two = (joined(quiet_trainer().predict(each, loader(4, new))) for each in (svi, loaded))
    assert one.shape == (20, 30)
    assert torch.equal(one, two)


class Kept(PyroSVIModule):
    """A subclass whose hyperparameters a checkpoint holds."""

    def __init__(self, prediction=None):
        super().__init__(prediction=prediction)
        self.save_hyperparameters()

    model = staticmethod(mean_only)


@no_validation
def test_settings_in_a_dict_are_kept_with_the_hyperparameters(tmp_path):
    svi = Kept({"num_samples": 7, "summary": ["mean", 0.5]})
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=50))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    loaded = Kept.load_from_checkpoint(tmp_path / "fit.ckpt")
    assert loaded.prediction == Prediction(num_samples=7, summary=("mean", 0.5))


def test_settings_survive_copies_and_pickles():
    svi = known(prediction=Prediction(7, sites=["x"]))
    for again in (copy.deepcopy(svi), pickle.loads(pickle.dumps(svi))):
        assert again.prediction == svi.prediction == Prediction(7, sites="x")


@pytest.mark.parametrize("after_a_trainer", [False, True])
def test_each_call_of_predict_step_by_hand_stands_alone(after_a_trainer):
    svi = known(prediction={"num_samples": 3})
    if after_a_trainer:
        quiet_trainer().predict(svi, loader(1))
    one, two = svi.predict_step(X[:4]), svi.predict_step(X[:4])
    assert one["x"].shape == (3, 4)
    assert not torch.equal(one["x"], two["x"])


def test_a_hook_that_leaves_out_the_globals_is_told():
    class Own(PyroSVIModule):
        model = staticmethod(mean_only)

        def on_predict_start(self):
            pass

    svi = Own(dataset_size=N)
    svi.loss(X)
    with pytest.raises(RuntimeError, match=r"let it call super\(\).on_predict_start"):
        quiet_trainer().predict(svi, loader(1))


def test_predicting_before_a_fit_is_refused():
    with pytest.raises(RuntimeError, match="the guide has no parameters yet"):
        quiet_trainer().predict(PyroSVIModule(mean_only, dataset_size=N), loader(1))


def test_an_error_names_the_batch():
    svi = known(prediction={"sites": "z", "num_samples": 2})
    with pytest.raises(ValueError, match=r"prediction batch 0 \(100 rows.*site 'z' is no site"):
        quiet_trainer().predict(svi, loader(2))


def test_rows_that_a_sampler_repeats_are_predicted_once():
    svi = known(prediction={"num_samples": 3, "summary": "mean"})
    data = torch.arange(7.0)
    counts = []
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
        found = quiet_trainer().predict(svi, DataLoader(data, batch_size=3, sampler=sampler))
        counts.append([each["x"].shape[1] if each else 0 for each in found])
    assert counts == [[3, 1], [3, 0]]


def test_several_loaders_are_predicted_one_after_the_other():
    svi = known(prediction={"num_samples": 3})
    found = quiet_trainer().predict(svi, [loader(2, X[:10]), loader(1, X[:6])])
    assert [joined(each).shape for each in found] == [(3, 10), (3, 6)]


# -- latents of rows -----------------------------------------------------------------------------


def with_local(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1e-3), obs=y)


def fitted_rows(data):
    svi = PyroSVIModule(
        with_local, AutoNormal, prediction=Prediction(50, sites=["z", "y"], summary="mean")
    )
    quiet_trainer(max_epochs=1).fit(svi, data)
    with torch.no_grad():
        svi.guide.locs._parameters["z_unconstrained"].copy_(10.0 * torch.arange(N))
        svi.guide.scales._parameters["z_unconstrained"].fill_(-9.0)
    return svi


@no_validation
def test_rows_of_the_fit_have_their_own_latents():
    rows = IndexedDataset(X)
    svi = fitted_rows(DataLoader(rows, batch_size=50))
    found = quiet_trainer().predict(svi, DataLoader(rows, batch_size=64))
    for site in ("z", "y"):
        assert (joined(found, site)[0] - 10 * torch.arange(N)).abs().max() < 0.01


@no_validation
def test_rows_of_a_module_from_a_checkpoint_have_their_own_latents(tmp_path):
    rows = IndexedDataset(X)
    loaded = from_checkpoint(fitted_rows(DataLoader(rows, batch_size=50)), tmp_path)
    found = quiet_trainer().predict(loaded, DataLoader(IndexedDataset(X), batch_size=64))
    assert (joined(found, "z")[0] - 10 * torch.arange(N)).abs().max() < 0.01


def from_checkpoint(svi, folder):
    trainer = quiet_trainer()
    trainer.strategy.connect(svi)
    trainer.save_checkpoint(folder / "fit.ckpt")
    return PyroSVIModule.load_from_checkpoint(
        folder / "fit.ckpt", model=with_local, prediction=svi.prediction
    )


@no_validation
def test_rows_of_a_datamodule_have_their_own_latents_after_loading(tmp_path):
    svi = fitted_rows(ArrayDataModule(X, batch_size=50).train_dataloader())
    loaded = from_checkpoint(svi, tmp_path)
    data = ArrayDataModule(X.clone(), predict=X.clone(), batch_size=64)
    found = quiet_trainer().predict(loaded, datamodule=data)
    assert (joined(found, "z")[0] - 10 * torch.arange(N)).abs().max() < 0.01
    assert not data.predict_dataloader().dataset.row_numbers


@no_validation
@pytest.mark.parametrize("workers", [0, 1])
def test_rows_of_a_datamodule_have_their_own_latents_from_a_path(tmp_path, workers):
    svi = fitted_rows(ArrayDataModule(X, batch_size=50).train_dataloader())
    from_checkpoint(svi, tmp_path)
    fresh = PyroSVIModule(with_local, prediction=svi.prediction)
    data = ArrayDataModule(X, predict=X, batch_size=64, num_workers=workers)
    found = quiet_trainer().predict(fresh, datamodule=data, ckpt_path=tmp_path / "fit.ckpt")
    assert (joined(found, "z")[0] - 10 * torch.arange(N)).abs().max() < 0.01


@no_validation
@pytest.mark.parametrize("train", [X, torch.cat([X, X])], ids=["other rows", "another number"])
def test_other_rows_of_a_datamodule_are_new_after_loading(tmp_path, train):
    svi = fitted_rows(ArrayDataModule(X, batch_size=50).train_dataloader())
    loaded = from_checkpoint(svi, tmp_path)
    data = ArrayDataModule(train, predict=train.flip(0), batch_size=N)
    with pytest.warns(UserWarning, match=f"'z' of {N} rows of the first such batch"):
        found = quiet_trainer().predict(loaded, datamodule=data)
    assert joined(found, "z").abs().max() < 5


@no_validation
def test_rows_of_a_datamodule_are_numbered_while_they_are_predicted():
    data = ArrayDataModule(X, batch_size=50, shuffle=False)
    svi = fitted_rows(data.train_dataloader())
    loaders = data.train_dataloader()
    found = quiet_trainer().predict(svi, loaders)
    assert (joined(found, "z")[0] - 10 * torch.arange(N)).abs().max() < 0.01
    assert not loaders.dataset.row_numbers


@no_validation
def test_rows_of_a_datamodule_have_no_numbers_after_a_prediction_that_failed():
    data = ArrayDataModule(X, predict=X, batch_size=50, shuffle=False)
    svi = fitted_rows(data)
    svi.prediction = Prediction(5, sites="nothing")
    with pytest.raises(ValueError, match="nothing"):
        quiet_trainer().predict(svi, datamodule=data)
    assert not data.predict_dataloader().dataset.row_numbers


@no_validation
def test_new_rows_are_told_of_once_and_drawn_from_the_prior():
    svi = fitted_rows(DataLoader(IndexedDataset(X), batch_size=50))
    with pytest.warns(UserWarning, match="'z' of 10 rows of the first such batch") as said:
        found = quiet_trainer().predict(svi, DataLoader(X[:30], batch_size=10))
    assert sum("the guide knows nothing" in str(each.message) for each in said) == 1
    # The prior is N(mu, 1), and mu of the guide within 1 after a few steps.
    assert joined(found, "z").abs().max() < 3
    svi.prediction = Prediction(50, sites="z", summary="mean", local="prior")
    found = quiet_trainer().predict(svi, DataLoader(IndexedDataset(X), batch_size=10))
    assert joined(found, "z").abs().max() < 3


# -- log-likelihood ------------------------------------------------------------------------------


def exact(posterior, rows):
    return dist.Normal(posterior["mu"][:, None], 1.0).log_prob(rows)


def test_log_likelihoods_of_a_datamodule_are_those_of_its_rows_in_order():
    data = ArrayDataModule(X, batch_size=30)
    svi = known()
    posterior = svi.posterior_samples(20)
    found = svi.log_likelihood(data, posterior=posterior)["x"]
    torch.testing.assert_close(found, exact(posterior, X))


ROWS = [7, 3, 90, 4, 5]


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampler": SubsetRandomSampler(ROWS), "batch_size": 2},
        {"sampler": ROWS, "batch_size": 2},
        {"batch_sampler": BatchSampler(SubsetRandomSampler(ROWS), 2, drop_last=True)},
    ],
)
def test_log_likelihoods_of_a_datamodule_are_of_the_rows_that_its_sampler_visits(sampling):
    class Some(LightningDataModule):
        def train_dataloader(self):
            return DataLoader(X, **sampling)

    svi = known()
    posterior = svi.posterior_samples(20)
    found = svi.log_likelihood(Some(), posterior=posterior)["x"]
    torch.testing.assert_close(found, exact(posterior, X[sorted(ROWS)]))


def test_log_likelihoods_of_a_loader_come_in_its_order():
    svi = known()
    posterior = svi.posterior_samples(20)
    backwards = [X[150:], X[:50]]
    found = svi.log_likelihood(backwards, posterior=posterior)["x"]
    torch.testing.assert_close(found, exact(posterior, torch.cat(backwards)))
    parts = list(svi.iter_log_likelihood(backwards, posterior=posterior))
    assert [each["x"].shape for each in parts] == [(20, 50), (20, 50)]


def test_log_likelihoods_draw_the_globals_once_for_all_batches():
    svi = known()
    found = svi.log_likelihood([X[:1]] * 5, 100)["x"]
    assert torch.equal(found, found[:, :1].expand(100, 5))
    assert len(found[:, 0].unique()) == 100


def test_log_likelihoods_of_rows_of_a_fit_have_their_latents():
    data = ArrayDataModule(X, batch_size=50)
    svi = PyroSVIModule(with_local, AutoNormal)
    quiet_trainer(max_epochs=1).fit(svi, datamodule=data)
    with torch.no_grad():
        svi.guide.locs._parameters["z_unconstrained"].copy_(X)
        svi.guide.scales._parameters["z_unconstrained"].fill_(-14.0)  # softplus: 1e-6
    found = svi.log_likelihood(data, 3)["y"]
    expected = -0.5 * torch.tensor(2 * torch.pi).log() - torch.tensor(1e-3).log()
    torch.testing.assert_close(found, expected.expand(3, N), atol=0.01, rtol=0)
    assert not data.train_dataloader().dataset.row_numbers


def test_one_batch_in_the_place_of_several_is_refused():
    with pytest.raises(TypeError, match=r"of one batch make \[batch\]"):
        known().log_likelihood(X)


def test_the_columns_of_one_batch_are_no_batches():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss((X, X))
    with pytest.raises(TypeError, match=r"of one batch make \[batch\]"):
        svi.log_likelihood((X, X))
    assert svi.log_likelihood([(X, X), [X, X]], 3)["y"].shape == (3, 2 * N)


def test_a_datamodule_of_several_training_loaders_is_refused():
    class Two(LightningDataModule):
        def train_dataloader(self):
            return {"a": loader(1), "b": loader(2)}

    with pytest.raises(ValueError, match="has 2 training loaders: hand over the one"):
        known().log_likelihood(Two())


def test_log_likelihoods_before_a_fit_are_refused():
    svi = PyroSVIModule(mean_only, dataset_size=N)
    with pytest.raises(RuntimeError, match="the guide has no parameters yet"):
        svi.log_likelihood([X], posterior={"mu": torch.zeros(3)})


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"summary": ["median"]}, 'summary must be "mean" or "sd"'),
        ({"summary": [1.5]}, r"a quantile in summary must lie in \[0, 1\], got 1.5"),
        ({"summary": []}, "summary is empty"),
        ({"summary": "sd", "num_samples": 1}, "needs num_samples of 2"),
        ({"local": "model"}, 'local must be "guide" or "prior"'),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_settings_that_cannot_serve_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PyroSVIModule(mean_only, prediction=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 3}, "prediction has no field 'samples'; it has num_samples, sites"),
        (7, "prediction must be a Prediction, or a dict of its fields"),
        ({"parallel": "yes"}, "parallel must be True or False"),
        ({"sites": 3}, "sites must be a name or names"),
    ],
)
def test_settings_of_a_wrong_kind_are_refused(given, message):
    with pytest.raises(TypeError, match=message):
        PyroSVIModule(mean_only, prediction=given)
