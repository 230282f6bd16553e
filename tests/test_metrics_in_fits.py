"""`metrics=`: what a module feeds to metrics in validation and test, and what it logs."""

import math
from functools import partial

import jsonargparse
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from metric_models import all_metrics
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from support import normal_mean, quiet_trainer, run_script
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.regression import (
    ContinuousRankedProbabilityScore,
    MeanAbsoluteError,
    MeanSquaredError,
)
from torchmetrics.wrappers import MinMaxMetric

from pyro_lightning import (
    CRPS,
    ArrayDataModule,
    IndexedDataset,
    IntervalCoverage,
    LogPredictiveDensity,
    NegativeELBO,
    PITHistogram,
    PyroSVIModule,
)
from pyro_lightning.metric_inputs import Given


class Seen(Metric):
    """Keeps all that it is fed."""

    def __init__(self):
        super().__init__()
        self.fed = []

    def update(self, draws, preds, target, log_likelihood, loss_per_obs, rows):
        self.fed.append((draws, preds, target, log_likelihood, loss_per_obs, rows))

    def compute(self):
        return torch.tensor(0.0)


def loader(*tensors, batch_size=10):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def validated(svi, *loaders, seed=0):
    """Validate; returns what is logged."""
    trainer = quiet_trainer()
    torch.manual_seed(seed)
    trainer.validate(svi, list(loaders), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def rows(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def settled(mean=0.3, sd=0.5, **options):
    """A ``normal_mean`` whose guide is N(mean, sd)."""
    svi = PyroSVIModule(normal_mean, dataset_size=100, **options)
    svi.loss(torch.zeros(5))
    with torch.no_grad():
        svi.guide.locs.mu.fill_(mean)
        svi.guide.scales.mu = torch.tensor(sd)
    return svi


# -- what is fed -------------------------------------------------------------------------------


def test_a_metric_is_fed_what_its_update_names():
    svi, x = settled(metrics=Seen()), rows(25)
    figures = validated(svi, loader(x))
    fed = svi.metrics_of("val")["Seen"].fed
    assert [each[-1] for each in fed] == [10, 10, 5]
    for (draws, preds, target, log_likelihood, _, _), part in zip(fed, x.split(10), strict=True):
        count = len(draws)
        assert count > 1
        assert draws.shape == log_likelihood.shape == (count, len(part))
        torch.testing.assert_close(target, part)
        torch.testing.assert_close(preds, draws.mean(0))
    mean = sum(float(each[-2]) * each[-1] for each in fed) / 25
    assert figures["val_loss_per_obs"] == pytest.approx(mean)


def test_draws_are_those_of_the_settings_of_prediction():
    def fed(seed):
        svi = settled(metrics=Seen(), prediction={"num_samples": 7, "seed": 5})
        validated(svi, loader(rows(10)), seed=seed)
        return svi.metrics_of("val")["Seen"].fed[0][0]

    assert fed(0).shape == (7, 10)
    assert torch.equal(fed(0), fed(1))


def test_global_latents_are_drawn_once_for_all_batches():
    svi, x = settled(sd=1.0, metrics=Seen()), torch.zeros(20)
    validated(svi, loader(x))
    first, second = (each[3] for each in svi.metrics_of("val")["Seen"].fed)
    # The density of one value under each draw of mu.
    torch.testing.assert_close(first, second)
    assert first.std(0).min() > 0.1


def test_draws_of_batches_have_noise_of_their_own():
    svi = settled(sd=1e-6, metrics=Seen())
    validated(svi, loader(torch.zeros(20)))
    first, second = (each[0] - 0.3 for each in svi.metrics_of("val")["Seen"].fed)
    correlation = (first * second).mean() / (first.std() * second.std())
    assert abs(correlation) < 0.05  # of 10,000 pairs: 0.01
    shifted = (first[1:] * second[:-1]).mean()
    assert abs(shifted) < 0.05


def test_elpd_is_that_of_the_predictive_density():
    svi, x = settled(mean=0.3, sd=0.5, metrics=LogPredictiveDensity()), rows(1000)
    figures = validated(svi, loader(x, batch_size=100))
    exact = stats.norm(0.3, math.sqrt(1.25)).logpdf(x.double().numpy())
    # p(x | mu) over its mean has a sd of 0.4 for a usual row: 0.4 / sqrt(1000) = 0.013.
    assert figures["val_elpd"] == pytest.approx(exact.mean(), abs=0.03)
    assert figures["val_elpd_se"] == pytest.approx(exact.std(ddof=1) / math.sqrt(1000), rel=0.1)


def test_predictions_of_torchs_regression_metrics_are_the_mean():
    svi, x = (
        settled(mean=0.3, sd=1e-6, metrics=[MeanSquaredError(), MeanAbsoluteError()]),
        rows(200),
    )
    figures = validated(svi, loader(x, batch_size=50))
    # The mean of 1,000 draws is 0.3 with an error of 0.03, which adds 0.001 to the square.
    assert figures["val_MeanSquaredError"] == pytest.approx(
        float((x - 0.3).square().mean()), abs=0.05
    )
    assert figures["val_MeanAbsoluteError"] == pytest.approx(
        float((x - 0.3).abs().mean()), abs=0.05
    )


def test_crps_is_the_closed_form():
    metrics = {"crps": CRPS(), "theirs": ContinuousRankedProbabilityScore()}
    svi, x = settled(0.3, 1e-6, metrics=metrics, prediction={"num_samples": 200}), rows(400)
    figures = validated(svi, loader(x, batch_size=100))
    z = (x - 0.3).double().numpy()
    exact = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - math.pi**-0.5
    # An ensemble of S draws adds E|x - x'| / (2 S) = 0.003 and noise of less than 0.01.
    assert figures["val_crps"] == pytest.approx(exact.mean(), abs=0.02)
    assert figures["val_theirs"] == pytest.approx(figures["val_crps"], rel=1e-5)


def test_the_negative_elbo_is_the_loss_of_an_observation():
    svi = settled(metrics={"nelbo": NegativeELBO()})
    figures = validated(svi, loader(rows(25)))
    assert figures["val_nelbo"] == pytest.approx(figures["val_loss_per_obs"], rel=1e-6)


def test_a_wrapper_of_torchmetrics_is_fed_predictions_and_target():
    svi = settled(metrics={"mse": MinMaxMetric(MeanSquaredError())})
    figures = validated(svi, loader(rows(25)))
    assert figures["val_raw"] == figures["val_max"] > 0


def test_what_a_mask_leaves_out_is_not_compared():
    def model(x, seen):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x, seen = rows(30), torch.arange(30) % 3 > 0
    svi = PyroSVIModule(
        model, dataset_size=30, metrics=[Seen(), IntervalCoverage(), MeanAbsoluteError()]
    )
    figures = validated(svi, loader(torch.where(seen, x, 1e6), seen))
    target = torch.cat([each[2] for each in svi.metrics_of("val")["Seen"].fed])
    torch.testing.assert_close(target, torch.where(seen, x, torch.nan), equal_nan=True)
    assert svi.metrics_of("val")["IntervalCoverage"].count == 20
    assert figures["val_MeanAbsoluteError"] < 10


@pytest.mark.parametrize("outer", [False, True])
def test_masks_of_distributions_leave_entries_out(outer):
    seen = torch.tensor([[True, False], [True, True], [False, False]])

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        normal = dist.Normal(loc.expand(len(x), 2), 1.0)
        masked = normal.to_event(1).mask(seen[:, 0]) if outer else normal.mask(seen).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("x", masked, obs=x)

    x = torch.arange(6.0).reshape(3, 2)
    svi = PyroSVIModule(model, dataset_size=3, metrics=Seen())
    validated(svi, loader(x, batch_size=3))
    left = seen[:, :1].expand(3, 2) if outer else seen
    target = svi.metrics_of("val")["Seen"].fed[0][2]
    torch.testing.assert_close(target, torch.where(left, x, torch.nan), equal_nan=True)


def test_columns_of_a_table_are_summed_in_the_log_likelihood_of_a_row():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 3, dim=-1), pyro.plate("data", len(x), dim=-2):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    svi = PyroSVIModule(model, dataset_size=6, metrics=Seen())
    x = rows(18).reshape(6, 3)
    validated(svi, loader(x, batch_size=6))
    draws, _, _, log_likelihood, _, _ = svi.metrics_of("val")["Seen"].fed[0]
    assert draws.shape[1:] == (6, 3)
    # A difference of rows depends on mu by their sums alone.
    squares = -0.5 * (x.square().sum(1) - x[0].square().sum())
    loc = (log_likelihood[:, 1] - log_likelihood[:, 0] - squares[1]) / (x[1].sum() - x[0].sum())
    expected = dist.Normal(loc.reshape(-1, 1, 1), 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(log_likelihood, expected, rtol=1e-4, atol=1e-4)


# -- sites -------------------------------------------------------------------------------------


def two_sites(x, y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        pyro.sample("y", dist.Normal(100.0 + loc, 1.0), obs=y)


def test_metrics_of_sites_are_logged_under_their_names():
    metrics = {"x": [MeanAbsoluteError()], "y": MetricCollection([MeanAbsoluteError(), Seen()])}
    svi = PyroSVIModule(two_sites, dataset_size=20, metrics=metrics)
    figures = validated(svi, loader(rows(20), rows(20)))
    assert figures["val_x_MeanAbsoluteError"] < 5
    assert figures["val_y_MeanAbsoluteError"] > 90
    assert "y_Seen" in svi.metrics_of("val")


def test_a_log_likelihood_of_no_site_is_that_of_all():
    metrics = {"elpd": LogPredictiveDensity(), "x": [Seen()], "y": [Seen()]}
    svi = PyroSVIModule(two_sites, dataset_size=20, metrics=metrics)
    figures = validated(svi, loader(rows(20), 100 + rows(20), batch_size=20))
    terms = [svi.metrics_of("val")[name].fed[0][3] for name in ("x_Seen", "y_Seen")]
    expected = ((terms[0] + terms[1]).logsumexp(0) - math.log(len(terms[0]))).mean()
    assert figures["val_elpd"] == pytest.approx(float(expected), rel=1e-5)


def test_keys_are_those_of_a_metric_collection():
    held = {"a": IntervalCoverage(), "b": IntervalCoverage(0.8), "mse": MeanSquaredError()}
    collection = MetricCollection(held, prefix="my_", postfix="_end")
    figures = validated(settled(metrics=collection), loader(rows(20)))
    draws, target = torch.zeros(40, 3), torch.zeros(3)
    collection.update(draws=draws, target=target, preds=target)
    assert {f"val_{key}" for key in collection.compute()} < figures.keys()


def test_draws_of_no_site_are_refused_where_several_are_observed():
    svi = PyroSVIModule(two_sites, dataset_size=20, metrics=IntervalCoverage())
    with pytest.raises(ValueError, match=r"observes 'x', 'y'.*metrics=\{'x': \[...\]\}"):
        validated(svi, loader(rows(20), rows(20)))


def test_metrics_of_a_site_that_is_not_observed_are_refused():
    svi = settled(metrics={"z": [LogPredictiveDensity()]})
    with pytest.raises(ValueError, match="metrics of 'z', but the model observes 'x'"):
        validated(svi, loader(rows(20)))


# -- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [3, "mse", {"mse": 3}, [3], {"x": [3]}, MeanSquaredError])
def test_what_is_no_metric_is_refused(metrics):
    with pytest.raises(TypeError, match="metrics must be"):
        PyroSVIModule(normal_mean, metrics=metrics)


def test_a_metric_that_asks_for_something_else_is_refused():
    with pytest.raises(TypeError, match="'mean' asks for 'value'; it can be fed draws, preds"):
        PyroSVIModule(normal_mean, metrics={"mean": MeanMetric()})


class Settled(PyroSVIModule):
    def __init__(self, metrics: Given = None):
        super().__init__(dataset_size=20, metrics=metrics)

    def model(self, x):
        normal_mean(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer releases have another name
def test_metrics_are_made_from_a_configuration():
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Settled, "svi")
    levels = {"class_path": "pyro_lightning.IntervalCoverage", "init_args": {"levels": [0.8]}}
    given = {"mse": "torchmetrics.MeanSquaredError", "interval": levels}
    read = parser.parse_object({"svi": {"metrics": given}})
    svi = parser.instantiate_classes(read).svi
    assert {"val_mse", "val_coverage_0.8"} <= validated(svi, loader(rows(20))).keys()


# -- life --------------------------------------------------------------------------------------


def fitted(metrics, **options):
    torch.manual_seed(0)
    svi = PyroSVIModule(normal_mean, metrics=metrics, **options)
    trainer = quiet_trainer(max_epochs=3, val_check_interval=2)
    trainer.fit(svi, datamodule=ArrayDataModule((rows(60),), batch_size=10, val_split=0.25))
    return svi, trainer, torch.rand(())


def test_metrics_change_neither_parameters_nor_losses_nor_random_numbers():
    plain, first, noise = fitted(None)
    svi, trainer, other = fitted(all_metrics())
    assert torch.equal(noise, other)
    for mine, theirs in zip(svi.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name, value in first.callback_metrics.items():
        assert torch.equal(trainer.callback_metrics[name], value)
    assert "val_elpd" in trainer.callback_metrics


def test_each_loader_has_figures_of_its_own():
    svi = settled(metrics=[MeanAbsoluteError(), LogPredictiveDensity()])
    near, far = loader(rows(20)), loader(rows(20) + 50)
    figures = validated(svi, near, far)
    assert figures["val_MeanAbsoluteError/dataloader_idx_0"] < 5
    assert figures["val_MeanAbsoluteError/dataloader_idx_1"] > 40
    assert figures["val_elpd/dataloader_idx_1"] < -900 < figures["val_elpd/dataloader_idx_0"]
    assert {"MeanAbsoluteError", "LogPredictiveDensity"} == set(svi.metrics_of("val", 1))
    assert "val_MeanAbsoluteError" in validated(svi, near)
    with pytest.raises(ValueError, match="metrics of 1 loaders, not of 1"):
        svi.metrics_of("val", 1)
    with pytest.raises(ValueError, match='stage must be "val" or "test"'):
        svi.metrics_of("train")


def test_metrics_can_be_fed_and_plotted_after_an_evaluation():
    svi = settled(metrics=PITHistogram())
    validated(svi, loader(rows(20)))
    metric = svi.metrics_of("val")["PITHistogram"]
    metric.update(rows(40).reshape(40, 1), rows(1))
    assert float(metric.masses.sum()) == pytest.approx(21)


def test_each_evaluation_begins_anew_and_stays_until_the_next():
    given = MeanAbsoluteError()
    svi = settled(metrics=given)
    validated(svi, loader(rows(20) + 50))
    again = validated(svi, loader(rows(20)))["val_MeanAbsoluteError"]
    assert again < 5
    trainer = quiet_trainer()
    trainer.test(svi, loader(rows(20) + 50), verbose=False)
    assert trainer.callback_metrics["test_MeanAbsoluteError"] > 40
    assert float(svi.metrics_of("val")["MeanAbsoluteError"].compute()) == pytest.approx(again)
    assert not given.update_called


def test_a_callback_can_watch_a_metric():
    torch.manual_seed(0)
    svi = PyroSVIModule(normal_mean, metrics=LogPredictiveDensity())
    watch = EarlyStopping("val_elpd", mode="max", patience=1, min_delta=100.0)
    trainer = quiet_trainer(max_epochs=50, callbacks=[watch])
    trainer.fit(svi, datamodule=ArrayDataModule((rows(40),), batch_size=10, val_split=0.25))
    assert trainer.current_epoch == 2


def test_metrics_are_in_a_checkpoint_only_if_persistent():
    plain = settled().state_dict().keys()
    assert settled(metrics=all_metrics()).state_dict().keys() == plain
    kept = NegativeELBO()
    kept.persistent(True)
    svi, other = settled(metrics=kept), settled(metrics=kept)
    figures = validated(svi, loader(rows(20)))
    other.load_state_dict(svi.state_dict())
    total = other.metrics_of("val")["NegativeELBO"].total
    assert float(total) == pytest.approx(20 * figures["val_NegativeELBO"], rel=1e-6)


def test_a_module_comes_back_from_a_checkpoint_with_metrics(tmp_path):
    svi, trainer, _ = fitted(LogPredictiveDensity())
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    loaded = PyroSVIModule.load_from_checkpoint(
        tmp_path / "fit.ckpt", model=normal_mean, metrics=LogPredictiveDensity()
    )
    held_out = loader(rows(20, seed=1))
    assert validated(loaded, held_out)["val_elpd"] == validated(svi, held_out)["val_elpd"]


def test_bad_batches_are_left_out_of_metrics():
    x = rows(30)
    x[15] = torch.nan
    svi = settled(metrics=Seen(), bad_batches="skip")
    with pytest.warns(UserWarning, match="skipped"):
        validated(svi, loader(x))
    fed = svi.metrics_of("val")["Seen"].fed
    torch.testing.assert_close(torch.cat([each[2] for each in fed]), torch.cat([x[:10], x[20:]]))


def test_nothing_is_logged_of_a_loader_without_a_good_batch():
    svi = settled(metrics=[LogPredictiveDensity(), Seen()], bad_batches="skip")
    with pytest.warns(UserWarning, match="skipped"):
        figures = validated(svi, loader(torch.full((10,), torch.nan)), loader(rows(10)))
    names = {name for name in figures if "elpd" in name or "Seen" in name}
    assert names == {f"val_{name}/dataloader_idx_1" for name in ("elpd", "elpd_se", "Seen")}


# -- latents of rows ---------------------------------------------------------------------------


def of_rows(x):
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z, sd), obs=x)


def test_rows_that_never_trained_are_predicted_from_the_prior():
    x = 3.0 * rows(300)
    data = ArrayDataModule((x,), batch_size=100, val_split=0.5)
    torch.manual_seed(0)
    svi = PyroSVIModule(
        of_rows, optimizer=partial(torch.optim.Adam, lr=0.05), metrics=IntervalCoverage(0.9)
    )
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(svi, datamodule=data)
    # z ~ N(0, 3) and less than 1.5 of noise: between 2 * 1.645 * 3 and that of N(0, 3.35).
    assert 9.5 < trainer.callback_metrics["val_width_0.9"] < 11.5


def test_an_amortised_guide_without_global_latents_is_evaluated():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, 1e-4))

    x = rows(50)
    for local, mean in (("guide", 0.8 * x), ("prior", 0.0 * x)):
        svi = PyroSVIModule(
            model, guide, dataset_size=50, metrics=Seen(), prediction={"local": local}
        )
        svi.loss(x)
        validated(svi, loader(x))
        preds = torch.cat([each[1] for each in svi.metrics_of("val")["Seen"].fed])
        # At most 1.1 / sqrt(1000) = 0.035, the largest of 50.
        torch.testing.assert_close(preds, mean, rtol=0, atol=0.15)


def test_numbered_rows_are_predicted_from_their_own_latents():
    x = 3.0 * rows(60)
    held = DataLoader(IndexedDataset(TensorDataset(x)), batch_size=20)
    torch.manual_seed(0)
    svi = PyroSVIModule(
        of_rows, optimizer=partial(torch.optim.Adam, lr=0.1), metrics=MeanAbsoluteError()
    )
    trainer = quiet_trainer(max_epochs=100, limit_val_batches=0)
    trainer.fit(svi, held)
    # Rows that never trained would be off by the mean of |N(0, 3)|, 2.4.
    assert validated(svi, held)["val_MeanAbsoluteError"] < 1.0


# -- several processes -------------------------------------------------------------------------


def test_metrics_are_equal_on_one_and_two_processes(tmp_path):
    from ddp_metrics import measure

    one, two = measure(1), run_script("ddp_metrics.py", tmp_path)
    # The loss draws noise of each rank, by design.
    names = [name for name in one if "loss" not in name and "nelbo" not in name]
    assert len(names) == 2 * 3 * 13
    for name in names:
        # All is in float64, but what Lightning logs and torchmetrics' own, which are float32.
        assert two[name] == pytest.approx(one[name], rel=2e-6, abs=1e-7, nan_ok=True), name
    for stage in ("val", "test"):
        for number in (0, 1, 2):
            suffix = f"/dataloader_idx_{number}"
            loss = two[f"{stage}_loss_per_obs{suffix}"]
            assert two[f"{stage}_nelbo{suffix}"] == pytest.approx(loss, rel=2e-6)


# -- simulated data ----------------------------------------------------------------------------


def regression(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), sigma), obs=y)


def test_intervals_of_90_percent_cover_88_to_92_percent_of_simulated_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8000, 3, generator=generator)
    noise = 0.5 * torch.randn(8000, generator=generator)
    y = x @ torch.tensor([1.0, -0.5, 0.2]) + noise
    torch.manual_seed(0)
    svi = PyroSVIModule(
        regression,
        partial(AutoNormal, init_scale=0.01),  # nearly that of the posterior
        optimizer=partial(torch.optim.Adam, lr=0.05),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
        metrics={"interval": IntervalCoverage(0.9), "pit": PITHistogram()},
    )
    trainer = quiet_trainer(max_epochs=6, limit_val_batches=0)
    datamodule = ArrayDataModule((x, y), batch_size=100, val_split=0.5)
    trainer.fit(svi, datamodule=datamodule)
    trainer = quiet_trainer()
    trainer.validate(svi, datamodule=datamodule, verbose=False)
    # 4,000 rows: a standard error of 0.5%, and the width is known to 1% from 4,000 others, which
    # is 0.2% of coverage.
    assert 0.88 <= float(trainer.callback_metrics["val_coverage_0.9"]) <= 0.92
    # 2 * 1.645 * 0.5; three standard errors of sigma are 3%.
    assert float(trainer.callback_metrics["val_width_0.9"]) == pytest.approx(1.645, rel=0.04)
    # About 0.4 sqrt(10 / 4000) = 0.02 where calibrated.
    assert float(trainer.callback_metrics["val_pit_error"]) < 0.05
