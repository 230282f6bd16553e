"""Metrics of predictive draws against closed forms, and against one update of all rows."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torchmetrics import MetricCollection
from torchmetrics.functional.regression import continuous_ranked_probability_score

from pyro_lightning import (
    CRPS,
    IntervalCoverage,
    LogPredictiveDensity,
    NegativeELBO,
    PITHistogram,
    crps,
    interval_coverage,
    log_predictive_density,
    pit_histogram,
)
from pyro_lightning.intervals import central_intervals


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# -- log predictive density --------------------------------------------------------------------


def test_elpd_of_a_conjugate_model_is_that_of_its_predictive_density():
    # y | mu ~ N(mu, 1), mu ~ N(0.4, 0.5^2): y ~ N(0.4, 1.25).
    y = normal(50) + 0.4
    mu = 0.4 + 0.5 * normal(20_000, 1, seed=1)
    log_likelihood = torch.distributions.Normal(mu, 1.0).log_prob(y)
    exact = stats.norm(0.4, math.sqrt(1.25)).logpdf(y.numpy())
    elpd, se = log_predictive_density(log_likelihood)
    # The sd of p(y | mu) over its mean is at most 0.9 here: by 20,000 draws an lpd errs by 0.006,
    # and the rows' mean, whose errors partly cancel, by less.
    assert elpd.item() == pytest.approx(exact.mean(), abs=0.01)
    assert se.item() == pytest.approx(exact.std(ddof=1) / math.sqrt(50), rel=0.02)


def test_elpd_of_one_draw_is_the_mean_log_likelihood():
    log_likelihood = normal(1, 7)
    elpd, se = log_predictive_density(log_likelihood)
    assert elpd.item() == pytest.approx(log_likelihood.mean().item(), rel=1e-12)
    assert se.item() == pytest.approx(stats.sem(log_likelihood[0].numpy()), rel=1e-9)


def test_elpd_is_finite_where_likelihoods_are_not():
    # exp(-2000) is 0 in float64.
    elpd, _ = log_predictive_density(torch.full((3, 2), -2000.0))
    assert elpd.item() == pytest.approx(-2000.0)


def test_the_error_of_elpd_survives_a_mean_that_is_large():
    log_likelihood = (normal(1, 1000) * 0.1 - 10_000).float()
    se = log_predictive_density(log_likelihood)[1]
    assert se.item() == pytest.approx(stats.sem(log_likelihood[0].double().numpy()), rel=1e-3)


def test_log_likelihoods_of_an_event_are_refused():
    with pytest.raises(ValueError, match=r"\(S, B\).*got \(3, 2, 4\)"):
        LogPredictiveDensity().update(torch.zeros(3, 2, 4))


# -- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [39, 40, 200])
def test_ends_of_intervals_are_numpys_weibull_quantiles(count):
    draws, levels = normal(count, 3), (0.5, 0.8, 0.95)
    lower, upper = central_intervals(draws, levels)
    for number, level in enumerate(levels):
        for ends, share in ((lower, (1 - level) / 2), (upper, (1 + level) / 2)):
            expected = np.quantile(draws.numpy(), share, axis=0, method="weibull")
            np.testing.assert_allclose(ends[number].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [19, 60])
def test_intervals_cover_a_further_draw_with_the_probability_of_their_level(count):
    # The mean over 20,000 rows has a standard error of at most 0.0035 (level 0.5): four of them.
    together = normal(count + 1, 20_000)
    coverage, _ = interval_coverage(together[1:], together[0], (0.5, 0.9))
    assert coverage.tolist() == pytest.approx([0.5, 0.9], abs=0.014)


def test_widths_of_normal_draws_are_those_of_its_quantiles():
    _, width = interval_coverage(3.0 * normal(4000, 200), torch.zeros(200), (0.5, 0.9))
    # A quantile's sd is at most 3 / (0.103 * sqrt(4000)) * 0.22 = 0.1 (at 5%), over sqrt(200) rows.
    expected = [6 * stats.norm.ppf(0.75), 6 * stats.norm.ppf(0.95)]
    assert width.tolist() == pytest.approx(expected, abs=0.03)


def test_too_few_draws_for_a_level_are_refused_with_the_number_that_will_do():
    with pytest.raises(ValueError, match=r"level 0\.9 needs at least 19 draws, got 18"):
        IntervalCoverage(0.9).update(torch.zeros(18, 2), torch.zeros(2))
    IntervalCoverage(0.9).update(torch.zeros(19, 2), torch.zeros(2))


@pytest.mark.parametrize("levels", [1.0, 0.0, (), (0.5, 0.5), -0.1, "0.9", None])
def test_levels_that_are_no_probabilities_are_refused(levels):
    with pytest.raises((ValueError, TypeError), match="level"):
        IntervalCoverage(levels)


def test_a_column_of_draws_for_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"got \(30, 4, 1\) for a target of \(4,\)"):
        IntervalCoverage().update(torch.zeros(30, 4, 1), torch.zeros(4))


def test_entries_that_were_not_observed_are_left_out():
    draws, target = normal(30, 40, 2), normal(40, 2, seed=1)
    holes = target.clone()
    holes[::3, 0] = torch.nan
    seen = ~holes.isnan()
    for measure in (interval_coverage, pit_histogram):
        found, expected = measure(draws, holes), measure(draws[:, seen], target[seen])
        torch.testing.assert_close(found, expected)


def test_two_levels_in_a_collection_are_both_updated():
    # After the first batch the sums of both are equal: neither level covers, both are as wide.
    both = MetricCollection({"a": IntervalCoverage(0.5), "b": IntervalCoverage(0.9)})
    both.update(draws=torch.zeros(39, 5), target=torch.ones(5))
    draws = torch.arange(1.0, 40.0).unsqueeze(1)
    both.update(draws=draws, target=torch.tensor([5.0]))
    found = both.compute()
    assert found["coverage_0.5"].item() == 0
    assert found["coverage_0.9"].item() == pytest.approx(1 / 6)


# -- calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [3, 7, 10])
def test_the_histogram_of_each_rank_once_is_flat(bins):
    # Where the observation is distributed as the draws, each of the S + 1 ranks is as likely.
    draws = torch.arange(9.0).unsqueeze(1).expand(9, 10)
    histogram = pit_histogram(draws, torch.arange(10.0) - 0.5, bins)
    assert histogram.tolist() == pytest.approx([1 / bins] * bins)


def test_the_histogram_of_counts_is_flat_where_they_are_distributed_as_the_draws():
    # All pairs of a Bernoulli(1/2) and of three draws of it, each as likely.
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    histogram = pit_histogram(values[:, 1:].T, values[:, 0], bins=5)
    assert histogram.tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize(("scale", "shape"), [(0.5, "U"), (2.0, "hump")])
def test_the_histogram_shows_predictions_of_a_wrong_width(scale, shape):
    histogram = pit_histogram(scale * normal(200, 5000), normal(5000, seed=1), bins=5)
    # Phi^-1 of the bins' edges, seen from the scale of the predictions.
    edges = scale * stats.norm.ppf(np.linspace(0, 1, 6))
    expected = np.diff(stats.norm.cdf(edges))
    # A share errs by sqrt(0.24 / 5000) = 0.007 at most, and by edges of 200 draws by 0.003.
    assert histogram.tolist() == pytest.approx(expected, abs=0.025)
    assert (histogram[0] > histogram[2]) == (shape == "U")


def test_the_distance_from_equal_shares_of_a_calibrated_prediction_is_small():
    metric = PITHistogram(bins=10)
    together = normal(100, 4000)
    metric.update(together[1:], together[0])
    # Its mean is 0.4 sqrt(10 / 4000) = 0.02.
    assert metric.compute()["pit_error"].item() < 0.05


def test_a_histogram_is_plotted_as_densities():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    metric = PITHistogram(bins=4)
    metric.update(torch.tensor([1.0, 2.0, 3.0]).unsqueeze(1).expand(3, 2), torch.tensor([0.0, 1.5]))
    figure, axes = metric.plot()
    assert [bar.get_height() for bar in axes.patches] == [2.0, 2.0, 0.0, 0.0]
    assert [bar.get_x() for bar in axes.patches] == [0.0, 0.25, 0.5, 0.75]
    other, given = pyplot.subplots()
    assert metric.plot(metric.compute(), ax=given) == (other, given)
    pyplot.close(figure)
    pyplot.close(other)


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pyro-lightning\[plots\]"):
        PITHistogram().plot()


# -- CRPS --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 101])
def test_crps_is_torchmetrics_own(count):
    draws, target = normal(count, 30), normal(30, seed=1)
    expected = continuous_ranked_probability_score(draws.T, target)
    torch.testing.assert_close(crps(draws, target), expected, rtol=1e-9, atol=1e-9)


def test_crps_of_vectors_leaves_out_what_was_not_observed():
    draws, target = normal(20, 6, 2), normal(6, 2, seed=1)
    target[::2, 1] = torch.nan
    metric, seen = CRPS(), ~target.isnan()
    metric.update(draws, target)
    expected = continuous_ranked_probability_score(draws[:, seen].T, target[seen])
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_crps_of_normal_draws_is_the_closed_form():
    # Gneiting and Raftery 2007, equation 21: sigma [z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)].
    sigma, target = 1.5, torch.tensor([-2.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    z = target.numpy() / sigma
    exact = sigma * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    draws = sigma * normal(2000, 4)
    found = crps(draws, target)
    # |x - y| has a sd of at most 1.5: 0.034 in a mean of 2,000, 0.02 over four rows.
    assert found.item() == pytest.approx(exact.mean(), abs=0.06)


# -- sums over batches -------------------------------------------------------------------------


def fed(metric, rows):
    """Feed a metric these rows of one data set."""
    draws, target, density = normal(50, 31), normal(31, seed=1), normal(50, 31, seed=2)
    if isinstance(metric, LogPredictiveDensity):
        metric.update(density[:, rows])
    elif isinstance(metric, NegativeELBO):
        metric.update(target[rows].mean(), len(target[rows]))
    else:
        metric.update(draws[:, rows], target[rows])


METRICS = [LogPredictiveDensity, IntervalCoverage, PITHistogram, CRPS, NegativeELBO]


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_of_batches_is_that_of_all_rows(kind):
    whole, parts = kind(), kind()
    fed(whole, slice(None))
    for rows in (slice(0, 4), slice(4, 5), slice(5, None)):
        fed(parts, rows)
    torch.testing.assert_close(parts.compute(), whole.compute())


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_is_in_a_checkpoint_if_it_is_persistent(kind):
    metric = kind()
    assert not metric.state_dict()
    metric.persistent(True)
    fed(metric, slice(None))
    other = kind()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other._update_count = 1  # of which torchmetrics keeps no record
    torch.testing.assert_close(other.compute(), metric.compute())


def test_metrics_are_their_functions():
    draws, target, density = normal(50, 31), normal(31, seed=1), normal(50, 31, seed=2)
    made = [kind() for kind in METRICS[:4]]
    for metric in made:
        fed(metric, slice(None))
    elpd, coverage, pit, score = (metric.compute() for metric in made)
    torch.testing.assert_close((elpd["elpd"], elpd["elpd_se"]), log_predictive_density(density))
    covered, width = interval_coverage(draws, target, (0.5, 0.9))
    assert [coverage["coverage_0.5"], coverage["coverage_0.9"]] == covered.tolist()
    assert [coverage["width_0.5"], coverage["width_0.9"]] == width.tolist()
    torch.testing.assert_close(pit["pit"], pit_histogram(draws, target))
    assert score.item() == pytest.approx(crps(draws, target).item(), rel=1e-6)
