"""The table of sites: its numbers by hand, and how it is printed."""

import builtins
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoNormal
from support import MixedGuide, MixedModel, mixed_rows, normal_mean
from torch import nn

from pyro_lightning import PyroSVIModule

N, B = 20, 4
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def model(x):
    """A latent at a point, one for each row, in a guide whose values are known."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.deterministic("total", mu.sum())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 2, dim=-2):
            pyro.sample("x", dist.Normal(z + mu.sum(), 1.0), obs=x.expand(2, -1))


def guide(x):
    at = pyro.param("at", torch.tensor([1.0, 0.0, -1.0]))
    pyro.sample("helper", dist.Delta(torch.tensor(0.0)), infer={"is_auxiliary": True})
    pyro.sample("mu", dist.Delta(at, log_density=0.25, event_dim=1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.zeros(len(x)), log_density=0.5))


def table(batch=None, **options):
    svi = PyroSVIModule(model, guide, **{"dataset_size": N, **options})
    return svi.site_table(torch.ones(B) if batch is None else batch)


# -- a row of each kind ----------------------------------------------------------------------------


def test_global_latent():
    row = table()["mu"]
    assert (row.kind, row.plates, row.shape, row.scale) == ("global latent", (), (3,), 1)
    # Squares of 1, 0 and -1.
    assert row.log_prob == pytest.approx(-3 * HALF_LOG_2_PI - 1, rel=1e-6)
    assert row.log_q == pytest.approx(0.25, rel=1e-6)


def test_local_latent():
    row = table()["z"]
    assert (row.kind, row.plates, row.shape) == ("local latent", (("data", B),), (B,))
    assert row.scale == N / B
    assert row.log_prob == pytest.approx(-N * HALF_LOG_2_PI, rel=1e-6)
    assert row.log_q == pytest.approx(N * 0.5, rel=1e-6)


def test_observed_site():
    row = table()["x"]
    assert (row.kind, row.guide, row.log_q) == ("observed", "-", None)
    assert (row.plates, row.shape) == ((("data", B), ("columns", 2)), (2, B))
    # Ones at a mean of 0, in two columns.
    assert row.log_prob == pytest.approx(-2 * N * (HALF_LOG_2_PI + 0.5), rel=1e-6)


def test_deterministic_and_auxiliary_sites_and_parameters():
    rows = table()
    assert (rows["total"].kind, rows["total"].log_prob) == ("deterministic", 0)
    assert (rows["helper"].kind, rows["helper"].log_prob) == ("auxiliary", None)
    parameter = rows["_pyro_param_store.at"]
    assert (parameter.kind, parameter.shape, parameter.guide) == ("parameter", (3,), "-")
    assert parameter.scale is parameter.log_prob is parameter.log_q is None


def test_rows_add_up_to_the_elbo():
    # Of the same draw, in a model and guide that use the noise of their batch alone.
    def plate(x, rows):
        return pyro.plate("data", len(x))

    batch = mixed_rows(B)
    svi = PyroSVIModule(MixedModel(plate), MixedGuide(plate), dataset_size=N)
    svi.loss(batch)
    torch.manual_seed(3)
    loss = svi.loss(batch).item()
    torch.manual_seed(3)
    rows = svi.site_table(batch)
    elbo = sum(row.log_prob or 0.0 for row in rows) - sum(row.log_q or 0.0 for row in rows)
    assert elbo == pytest.approx(-loss, rel=1e-5)


def test_largest_of_a_tensor_of_scales():
    def weighted(x):
        with poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0, 0.5])):
            normal_mean(x)

    svi = PyroSVIModule(weighted, AutoNormal, dataset_size=N)
    assert svi.site_table(torch.zeros(B))["x"].scale == 3 * N / B


# -- who guides ------------------------------------------------------------------------------------


def two_latents(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        label = pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(mu + shift + label, 1.0), obs=x)


def guides_of(guide, model=two_latents):
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    rows = PyroSVIModule(model, guide, elbo, dataset_size=N).site_table(torch.zeros(B))
    return {row.name: row.guide for row in rows if row.kind not in ("parameter", "observed")}


def test_autoguide_and_enumeration():
    guides = guides_of(AutoNormal(poutine.block(two_latents, hide=["label"])))
    assert {name: guides[name] for name in ("mu", "shift", "label")} == {
        "mu": "AutoNormal",
        "shift": "AutoNormal",
        "label": "enumerated",
    }


def test_parts_of_a_list():
    both = poutine.block(two_latents, hide=["label"])
    guide = AutoGuideList(both)
    guide.append(AutoDiagonalNormal(poutine.block(two_latents, expose=["mu"])))
    guide.append(lambda x: {"shift": pyro.sample("shift", dist.Delta(torch.tensor(0.0)))})
    guides = guides_of(guide)
    assert guides["mu"] == "AutoDiagonalNormal (0)"
    assert guides["shift"] == "AutoCallable (1)"
    assert guides["_AutoGuideList.0_latent"] == "AutoGuideList"


def test_function_module_enumeration_in_the_guide_and_nobody():
    def guide(x):
        pyro.sample("mu", dist.Delta(torch.tensor(0.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    class Guide(nn.Module):
        def forward(self, x):
            guide(x)

    labels = guides_of(guide)
    assert labels == {
        "mu": "guide function",
        "shift": "-",
        "label": "guide function, enumerated",
    }
    assert guides_of(Guide())["mu"] == "Guide"


# -- looking at it ---------------------------------------------------------------------------------


def test_table_is_a_sequence_and_finds_names():
    rows = table()
    assert [row.name for row in rows[:3]] == ["mu", "total", "z"]
    assert len(rows) == len(list(rows)) == 6
    assert rows[3] == rows["x"]
    with pytest.raises(KeyError, match="'y'.*'mu', 'total'"):
        rows["y"]


def test_text_lists_every_row_in_columns():
    lines = str(table()).splitlines()
    assert len(lines) == 7
    assert lines[0].split() == "site kind plates shape scale log p log q guide".split()
    assert lines[4].split() == "x observed data: 4, columns: 2 (2, 4) 5 -56.7575 -".split()
    assert len({line.index("(") for line in lines[1:]}) == 1


def test_rich_rendering():
    from rich.console import Console

    console = Console(width=120, file=io.StringIO())
    console.print(table())
    text = console.file.getvalue()
    assert all(heading in text for heading in ("site", "log p", "guide"))
    assert "data: 4, columns: 2" in text and "-56.7575" in text


def test_rich_that_is_not_installed(monkeypatch):
    real = builtins.__import__

    def without_rich(name, *rest):
        if name.startswith("rich"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    with pytest.raises(ImportError, match=r"pyro-lightning\[rich\]"):
        table().__rich__()
