"""R-hat, effective sizes and errors of means, beside closed forms of an AR(1) process and ArviZ."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from pyro_lightning.guide_units import units_of_parameters
from pyro_lightning.iterates import (
    Trail,
    best_r_hat,
    effective_sizes,
    exactness,
    split_r_hat,
)


def autoregressive(phi, steps, series, seed=0):
    """Stationary series ``x_t = phi x_{t-1} + e_t`` of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, series, generator=generator, dtype=torch.float64)
    found = [noise[0]]
    for each in noise[1:]:
        found.append(phi * found[-1] + (1 - phi**2) ** 0.5 * each)
    return torch.stack(found)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_sizes_of_an_autoregressive_process(phi):
    sizes = effective_sizes(autoregressive(phi, 4000, 200))
    expected = 4000 * (1 - phi) / (1 + phi)
    # The estimate of a series has a relative sd of a tenth or two, their mean of 200 of 1.5%; it
    # is biased by what is cut off, and by the mean of the halves.
    assert float(sizes.mean()) == pytest.approx(expected, rel=0.06)


def test_errors_of_means_are_the_spread_of_means_over_series():
    iterates = autoregressive(0.8, 2000, 2000)
    # The sd over 2,000 series is known to 1.6%.
    expected = float(iterates.mean(0).std())
    units = torch.full((1,), 4.0, dtype=torch.float64)
    errors = [exactness(each[:, None], units, 0.0).mcse for each in iterates.T[:300]]
    assert 4 * float(np.mean(errors)) == pytest.approx(expected, rel=0.06)


def test_series_that_hardly_move_need_no_sample_size():
    slow = autoregressive(0.99, 1000, 1) * 0.01
    units = torch.ones(1, dtype=torch.float64)
    assert exactness(slow, units, 0.05).ess == float("inf")
    assert exactness(slow, units, 0.001).ess < 50
    assert exactness(slow, units * float("nan"), 0.05).ess < 50


def test_alternating_draws_are_worth_more_than_independent_ones():
    assert float(effective_sizes(autoregressive(-0.5, 4000, 50)).mean()) > 1.5 * 4000


def test_r_hat_of_halves_by_its_definition():
    series = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 6.0])[:, None]
    one, two = np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 6.0])
    within = (one.var(ddof=1) + two.var(ddof=1)) / 2
    between = 3 * np.var([one.mean(), two.mean()], ddof=1)
    expected = np.sqrt((2 / 3 * within + between / 3) / within)
    assert float(split_r_hat(series)) == pytest.approx(expected, rel=1e-6)


def test_r_hat_of_a_jump_is_infinite_and_of_no_motion_1():
    jump = torch.tensor([0.0] * 10 + [1.0] * 10)
    found = split_r_hat(torch.stack([jump, torch.ones(20)], 1))
    assert found.tolist() == [float("inf"), 1.0]


def test_windows_leave_a_beginning_out_that_was_far_away():
    stationary = autoregressive(0.5, 1000, 3)
    away = torch.linspace(50, 0, 300, dtype=torch.float64)[:, None].expand(-1, 3)
    series = torch.cat([away, stationary])
    assert float(split_r_hat(series).max()) > 1.2
    assert best_r_hat(series, 200) < 1.05
    assert best_r_hat(series[:300], 200) > 1.5  # on the way


def test_too_short_a_series_has_no_r_hat():
    assert best_r_hat(torch.zeros(200, 1), 200) is None
    assert best_r_hat(torch.zeros(211, 1), 200) == 1.0


def test_arviz_gives_the_same_figures():
    arviz = pytest.importorskip("arviz", reason="needs ArviZ")
    iterates = autoregressive(0.7, 1000, 20)
    for series, r_hat, size in zip(
        iterates.T.numpy(), split_r_hat(iterates), effective_sizes(iterates), strict=True
    ):
        halves = series.reshape(2, -1)  # ArviZ wants two chains, and these are what it would split
        assert float(r_hat) == pytest.approx(float(arviz.rhat(halves, method="identity")))
        # ArviZ adds one more autocorrelation where the sums of two end.
        assert float(size) == pytest.approx(float(arviz.ess(series[None], method="mean")), rel=0.05)


def test_a_trail_spans_all_that_came():
    trail = Trail(8)
    for number in range(100):
        trail.add(torch.tensor([float(number)]))
    kept = trail.values().flatten().tolist()
    assert trail.interval == 16
    assert kept == [0, 16, 32, 48, 64, 80, 96]


def test_a_trail_goes_on_from_its_state():
    whole, first, second = Trail(8), Trail(8), Trail(8)
    for number in range(50):
        entry = torch.tensor([float(number)])
        whole.add(entry)
        if number < 21:
            first.add(entry)
        if number == 20:
            second.load_state_dict(first.state_dict())
        if number > 20:
            second.add(entry)
    assert torch.equal(second.values(), whole.values())


def two_latents():
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(0.0, 1.0))


def moved(kind):
    guide = kind(two_latents, init_scale=0.5)
    guide()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return guide


def sds_of_draws(guide):
    torch.manual_seed(0)
    draws = [guide() for _ in range(2000)]
    drawn = [torch.stack([each[name] for each in draws]).std(0) for name in ("a", "b")]
    return torch.cat([sd.reshape(-1) for sd in drawn]).detach()


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_units_of_locations_are_sds_of_draws(kind):
    guide = moved(kind)
    units = units_of_parameters(guide)
    assert units.keys() == {id(parameter) for parameter in guide.parameters()}
    locs = [p for name, p in guide.named_parameters() if name.startswith("loc")]
    found = torch.cat([units[id(loc)].reshape(-1) for loc in locs])
    # Of 2,000 draws a sd is known to 1.6%.
    torch.testing.assert_close(found, sds_of_draws(guide), rtol=0.06, atol=0)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal])
def test_units_of_scales_multiply_them_by_e(kind):
    guide = moved(kind)
    units = units_of_parameters(guide)
    before = sds_of_draws(guide)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if name.startswith("scale") and "tril" not in name:
                parameter.add_(0.01 * units[id(parameter)])
    # At equal noise; to the first order in 0.01.
    found = (sds_of_draws(guide) / before).log()
    torch.testing.assert_close(found, torch.full((3,), 0.01), rtol=0.02, atol=0)


def test_other_guides_have_no_units():
    assert units_of_parameters(lambda x: None) == {}
