"""ArviZ's container of a fit: its groups, names and order of rows, and what ArviZ says of it."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from support import no_validation, quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule, IndexedBatch, PyroSVIModule
from pyro_lightning.inference_data import GROUPS, named_dims, prior_draws

arviz = pytest.importorskip("arviz", reason="ArviZ is not installed")
OLD = arviz.__version__.startswith("0.")

N, D, S, NOISE = 40, 3, 500, 0.5


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


def rows(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator)
    w = torch.tensor([1.0, -0.5, 0.2])
    return x, x @ w + NOISE * torch.randn(N, generator=generator)


def posterior(x, y):
    """Mean and covariance of the coefficients, in closed form."""
    precision = x.T @ x / NOISE**2 + torch.eye(D, dtype=x.dtype)
    return torch.linalg.solve(precision, x.T @ y / NOISE**2), torch.linalg.inv(precision)


def exact():
    """A module whose guide is the posterior of the regression."""
    x, y = rows()
    svi = PyroSVIModule(regression, AutoMultivariateNormal, dataset_size=N)
    svi.loss((x, y))
    mean, covariance = posterior(x.double(), y.double())
    root = torch.linalg.cholesky(covariance)
    with torch.no_grad():
        svi.guide.loc.copy_(mean)
        svi.guide.scale = root.diagonal().float()
        svi.guide.scale_tril = (root / root.diagonal()[:, None]).float()
    torch.manual_seed(0)
    return svi, ArrayDataModule((x, y), batch_size=15)


def loo_in_closed_form(x, y):
    """log p(y_i | y_-i) of each row."""
    found = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        mean, covariance = posterior(x[others], y[others])
        sd = (x[i] @ covariance @ x[i] + NOISE**2).sqrt()
        found.append(dist.Normal(x[i] @ mean, sd).log_prob(y[i]))
    return torch.stack(found).numpy()


def loo_of(container):
    """ArviZ's own module of a generation, and its leave-one-out."""
    if container == "InferenceData":
        if not OLD:
            pytest.skip("InferenceData is of ArviZ 0.x, and 1.x is installed")
        return arviz.loo
    pytest.importorskip("arviz_base", reason="arviz_base, of ArviZ 1.x, is not installed")
    return pytest.importorskip("arviz_stats", reason="arviz_stats is not installed").loo


CONTAINERS = pytest.mark.parametrize("container", ["InferenceData", "DataTree"])


@CONTAINERS
def test_loo_of_a_linear_regression_is_the_exact_one(container):
    loo = loo_of(container)
    svi, data = exact()
    groups = ["posterior", "log_likelihood"]
    made = svi.to_inference_data(data, 2000, groups=groups, container=container)
    found = loo(made, pointwise=True)
    x, y = (each.double() for each in rows())
    expected = loo_in_closed_form(x, y)
    elpd, se = (found.elpd_loo, found.se) if hasattr(found, "elpd_loo") else (found.elpd, found.se)
    assert abs(elpd - expected.sum()) < se
    # Row by row and in the order of the data set; 2,000 draws leave an error of 0.01 or so where
    # k-hat is below 0.5, as here.
    by_row = found.loo_i if hasattr(found, "loo_i") else found.elpd_i
    np.testing.assert_allclose(by_row, expected, atol=0.1)
    assert abs(elpd - expected.sum()) < 0.25


@CONTAINERS
def test_every_group_has_its_shape_and_names(container):
    loo_of(container)
    x, y = rows()
    svi = PyroSVIModule(regression, dataset_size=N)
    svi.loss({"x": x, "y": y})
    data = ArrayDataModule({"x": x, "y": y}, batch_size=15)
    names = {"feature": ["age", "income", "size"], "flight": list(range(100, 100 + N))}
    dims = {"w": ["feature"], "y": ["flight"], "x": ["flight", "feature"]}
    found = svi.to_inference_data(data, S, dims=dims, coords=names, container=container)
    sizes = {
        ("posterior", "w"): {"chain": 1, "draw": S, "feature": D},
        ("posterior_predictive", "y"): {"chain": 1, "draw": S, "flight": N},
        ("log_likelihood", "y"): {"chain": 1, "draw": S, "flight": N},
        ("prior", "w"): {"chain": 1, "draw": S, "feature": D},
        ("observed_data", "y"): {"flight": N},
        ("constant_data", "x"): {"flight": N, "feature": D},
    }
    for (group, name), expected in sizes.items():
        assert dict(found[group][name].sizes) == expected
        assert list(found[group].data_vars) == [name]
    assert list(found["posterior"]["w"].sel(feature="income").shape) == [1, S]
    assert float(found["observed_data"]["y"].sel(flight=103)) == float(y[3])
    np.testing.assert_array_equal(found["constant_data"]["x"], x)


def test_a_field_that_equals_the_outcome_in_one_batch_is_whole():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mu * x, 1.0), obs=y)

    x, y = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    svi = PyroSVIModule(model, dataset_size=3)
    svi.loss({"x": x, "y": y})
    batches = [{"x": x[:2], "y": y[:2]}, {"x": x[2:], "y": y[2:]}]
    found = svi.to_inference_data(batches, 5, groups="constant_data")
    assert list(found["constant_data"].data_vars) == ["x"]
    np.testing.assert_array_equal(found["constant_data"]["x"], x)


def test_rows_stand_in_the_order_of_the_data_set():
    svi, data = exact()
    x, y = rows()
    found = svi.to_inference_data(data, S, groups=["observed_data", "log_likelihood"])
    np.testing.assert_array_equal(found["observed_data"]["y"], y)
    assert found["observed_data"]["y"].dims == ("data",)  # after the plate
    loader = DataLoader(TensorDataset(x.flip(0), y.flip(0)), batch_size=15)
    found = svi.to_inference_data(loader, S, groups="observed_data")
    np.testing.assert_array_equal(found["observed_data"]["y"], y.flip(0))


def test_all_groups_and_batches_share_the_draws_of_the_globals():
    svi, data = exact()
    x, y = rows()
    found = svi.to_inference_data(data, S)
    w = torch.from_numpy(found["posterior"]["w"].values[0])
    expected = dist.Normal(w @ x.T, NOISE).log_prob(y)
    np.testing.assert_allclose(found["log_likelihood"]["y"][0], expected, atol=1e-4)
    # What is left of a predictive draw is noise of each row and draw.
    noise = found["posterior_predictive"]["y"].values[0] - (w @ x.T).numpy()
    # Four standard errors of an sd.
    assert noise.std() == pytest.approx(NOISE, rel=4 / (2 * N * S) ** 0.5)
    assert np.abs(np.corrcoef(noise.T) - np.eye(N)).max() < 5 / S**0.5


def test_the_prior_is_the_models():
    svi, _ = exact()
    torch.manual_seed(0)
    draws = prior_draws(svi, 1000)["w"]
    # Four standard errors of means and variances of N(0, 1).
    assert draws.shape == (1000, D) and draws.mean(0).abs().max() < 4 / 1000**0.5
    assert (draws.var(0) - 1).abs().max() < 4 * (2 / 1000) ** 0.5


# ArviZ 0.23 calls a function of matplotlib as 3.11 no longer has it.
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_arviz_summarises_and_plots_it():
    if not OLD:
        pytest.skip("the plots of ArviZ 1.x are other ones")
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    plt = matplotlib.pyplot
    svi, data = exact()
    found = svi.to_inference_data(data, S, dims={"w": ["feature"]})
    x, y = (each.double() for each in rows())
    mean, covariance = posterior(x, y)
    summary = arviz.summary(found, kind="stats", round_to=6)
    sd = covariance.diagonal().sqrt().numpy()
    # Four standard errors of a mean and an sd of S draws.
    np.testing.assert_allclose(summary["mean"], mean, atol=4 * sd.max() / S**0.5)
    np.testing.assert_allclose(summary["sd"], sd, rtol=4 / (2 * S) ** 0.5)
    for plot in (arviz.plot_posterior, arviz.plot_forest, arviz.plot_ppc, arviz.plot_loo_pit):
        axes = plot(found, **({"y": "y"} if plot is arviz.plot_loo_pit else {}))
        assert np.size(axes)
        plt.close("all")


def test_latents_of_rows_are_drawn_for_each_row():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = rows()[1]
    svi = PyroSVIModule(model, AutoNormal, dataset_size=N)
    svi.loss(IndexedBatch(x, torch.arange(N)))
    means = torch.arange(float(N))
    with torch.no_grad():
        svi.guide.locs.z.copy_(means)
        svi.guide.scales.z = torch.full((N,), 0.01)
    svi._trained = torch.ones(N, dtype=torch.bool)  # as after an epoch
    data = ArrayDataModule(x, batch_size=15)
    torch.manual_seed(0)
    found = svi.to_inference_data(data, 100, local_latents=True)
    assert found["posterior"]["z"].dims == ("chain", "draw", "data")
    z, predicted = found["posterior"]["z"].values[0], found["posterior_predictive"]["x"].values[0]
    np.testing.assert_allclose(z, means.expand(100, N), atol=0.06)
    # A predictive draw is one around the latents of the same draw.
    assert z.shape == (100, N) and (predicted - z).std() == pytest.approx(1, abs=0.1)
    without = svi.to_inference_data(data, 10, groups=["posterior", "log_likelihood"])
    assert list(without["posterior"].data_vars) == ["mu"]
    expected = dist.Normal(means, 1.0).log_prob(x)
    np.testing.assert_allclose(without["log_likelihood"]["x"][0, 0], expected, rtol=0.2, atol=0.5)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"groups": ["posteriors"]}, "groups must be some of posterior, "),
        ({"dims": {"v": ["feature"]}}, "dims names 'v', but the variables are"),
        ({"dims": {"w": ["a", "b"]}}, r"the dimensions \['a', 'b'\], but a draw of it has the sh"),
        ({"coords": {"data": [1, 2]}}, "2 labels of 'data', but 'y' has 40 entries"),
        ({"coords": {"rows": [1, 2]}}, "coords labels 'rows', which no variable has"),
        ({"container": "xarray"}, "container must be"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
    ],
)
def test_names_that_are_not_there_are_refused(options, match):
    svi, data = exact()
    with pytest.raises(ValueError, match=match):
        svi.to_inference_data(data, **{"num_samples": 10, **options})


def test_a_group_that_cannot_be_made_is_named():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x_{i}", dist.Normal(mu, 1.0), obs=x[i])

    svi = PyroSVIModule(model, dataset_size=N)
    svi.loss(rows()[1][:3])
    data = DataLoader(rows()[1], batch_size=3)
    with pytest.raises(ValueError, match="group 'log_likelihood': site 'x_0' stands in the seque"):
        svi.to_inference_data(data, 10, groups=["posterior", "log_likelihood"])
    found = svi.to_inference_data(data, 10, groups=["posterior", "prior"])
    assert found["posterior"]["mu"].shape == found["prior"]["mu"].shape == (1, 10)


def test_likelihoods_sum_out_what_the_elbo_sums_out():
    def model(x):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            weights = torch.ones(2)
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            loc = torch.where(k == 0, locs[..., 0], locs[..., 1])
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x = rows()[1]
    guide = AutoNormal(pyro.poutine.block(model, expose=["locs"]))
    svi = PyroSVIModule(model, guide, TraceEnum_ELBO(), dataset_size=N)
    svi.loss(x)
    found = svi.to_inference_data(ArrayDataModule(x, batch_size=15), 20)
    locs = torch.from_numpy(found["posterior"]["locs"].values[0])
    each = dist.Normal(locs[:, None], 1.0).log_prob(x[:, None])
    expected = each.logsumexp(-1) - math.log(2)
    np.testing.assert_allclose(found["log_likelihood"]["x"][0], expected, atol=1e-5)


def test_without_arviz_the_error_says_what_to_install(monkeypatch):
    import pyro_lightning.arviz_apis as apis

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    svi, data = exact()
    monkeypatch.setattr(apis, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install \"pyro-lightning\[arviz\]\""):
        svi.to_inference_data(data, 10)
    with pytest.raises(ImportError, match="needs ArviZ 1.x, of which arviz-base is enough"):
        svi.to_inference_data(data, 10, container="DataTree")
    with pytest.raises(ImportError, match="needs ArviZ before 1.0"):
        svi.to_inference_data(data, 10, container="InferenceData")


def test_what_a_mask_leaves_out_was_not_observed():
    def model(x, y, seen):
        w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Poisson((x * w).sum(-1).exp()), obs=y)

    x, seen = rows()[0], torch.arange(N) % 3 > 0
    y = torch.where(seen, torch.arange(N), 999)
    svi = PyroSVIModule(model, AutoNormal, dataset_size=N)
    svi.loss((x, y, seen))
    data = ArrayDataModule({"x": x, "y": y, "seen": seen}, batch_size=15)
    groups = ["observed_data", "constant_data", "posterior_predictive", "log_likelihood"]
    found = svi.to_inference_data(data, 20, groups=groups)
    expected = np.where(seen, y, np.nan)
    np.testing.assert_array_equal(found["observed_data"]["y"], expected)
    assert set(found["constant_data"].data_vars) == {"x", "seen"}
    assert not found["log_likelihood"]["y"][..., ~seen.numpy()].any()


@no_validation
def test_a_fit_in_double_precision_draws_its_prior_in_it_after_the_fit_too():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)

    data = ArrayDataModule(tuple(each.double() for each in rows()), batch_size=20)
    svi = PyroSVIModule(model)
    quiet_trainer(max_epochs=1, precision="64-true").fit(svi, datamodule=data)
    found = svi.to_inference_data(data, 10)
    assert {found[group]["w"].dtype for group in ("prior", "posterior")} == {np.dtype("float64")}
    assert torch.get_default_dtype() == torch.float32


def test_dimensions_of_rows_are_named_after_the_plate():
    groups = {
        "posterior": {"w": np.zeros((1, 5, 3))},
        "log_likelihood": {"y": np.zeros((1, 5, 7))},
        "posterior_predictive": {"y": np.zeros((1, 5, 7, 2))},
    }
    assert named_dims(groups, "rows", {}, {"rows": range(7)}) == {"y": ["rows"]}
    assert named_dims(groups, "rows", {"y": ["n", "side"]}, {}) == {"y": ["n", "side"]}
    assert GROUPS[0] == "posterior" and math.prod(groups["posterior"]["w"].shape) == 15
