"""Pyro's capture-recapture example (Cormack, Jolly, Seber): alive or dead is summed out."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from example_support import BatchPlate, assert_same_steps, fit
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

YEARS, SURVIVAL, DETECTION = 6, 0.8, 0.6


def histories(count, seed):
    """Marked in a year, alive from one to the next by chance, and seen by chance while alive."""
    generator = torch.Generator().manual_seed(seed)
    marked = torch.randint(YEARS - 1, (count,), generator=generator)
    survives, seen = torch.rand(2, count, YEARS, generator=generator)
    alive, history = torch.zeros(count), torch.zeros(count, YEARS)
    for year in range(YEARS):
        alive = torch.where(marked == year, 1.0, alive * (survives[:, year] < SURVIVAL))
        history[:, year] = torch.where(marked == year, 1.0, alive * (seen[:, year] < DETECTION))
    return history


def make(plate):
    def model(history):
        survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
        detection = pyro.sample("detection", dist.Uniform(0.0, 1.0))
        with plate(history):
            alive = torch.ones(len(history))
            marked = torch.zeros(len(history), dtype=torch.bool)
            for year in pyro.markov(range(history.shape[1])):
                with poutine.mask(mask=marked):  # what comes before the marking does not count
                    chance = torch.where(marked, survival * alive, torch.ones(()))
                    alive = pyro.sample(
                        f"alive_{year}", dist.Bernoulli(chance), infer={"enumerate": "parallel"}
                    )
                    seen = dist.Bernoulli(detection * alive)
                    pyro.sample(f"seen_{year}", seen, obs=history[:, year])
                marked = marked | history[:, year].bool()

    return model, AutoMultivariateNormal(poutine.block(model, expose=["survival", "detection"]))


def elbo():
    return TraceEnum_ELBO(max_plate_nesting=1)


def log_likelihood(history, survival, detection):
    """The closed form: years until last seen, times the chance never to be seen again."""
    total, years = 0.0, torch.arange(YEARS)
    never_again = [torch.ones(())]  # by the years that are left
    for _ in range(YEARS - 1):
        missed = (1 - detection) * never_again[-1]
        never_again.append(1 - survival + survival * missed)
    for row in history:
        first, last = years[row.bool()][[0, -1]].tolist()
        between = row[first + 1 : last + 1]
        total = total + (last - first) * survival.log() + between.sum() * detection.log()
        total = total + (1 - between).sum() * (1 - detection).log()
        total = total + never_again[YEARS - 1 - last].log()
    return total


def exact_posterior(history, steps=80):
    """Means and sds of survival and detection, by a grid under the flat prior."""
    grid = (torch.arange(steps) + 0.5) / steps
    survival, detection = torch.meshgrid(grid, grid, indexing="ij")
    mass = log_likelihood(history, survival, detection).flatten().softmax(0)
    points = torch.stack([survival.flatten(), detection.flatten()])
    mean = points @ mass
    return mean, ((points - mean[:, None]) ** 2 @ mass).sqrt()


def test_same_steps_as_pyro():
    assert_same_steps(make, histories(24, seed=0), elbo=elbo(), plate="animals")


def test_survival_and_detection_have_the_exact_posterior():
    history = histories(200, seed=1)
    model, guide = make(BatchPlate("animals"))
    svi = fit(
        model, guide, history, batch_size=50, epochs=120, lr=0.1, elbo=elbo(), data_plate="animals"
    )
    draws = svi.posterior_samples(5000)
    mean, sd = exact_posterior(history)
    for i, (name, truth) in enumerate({"survival": SURVIVAL, "detection": DETECTION}.items()):
        # Noise of the last steps: at most 0.2 posterior sds and 14 % with three seeds. Without the
        # scale N/B = 4 the sds would be twice too large.
        assert float(draws[name].mean()) == pytest.approx(float(mean[i]), abs=0.4 * float(sd[i]))
        assert float(draws[name].std()) == pytest.approx(float(sd[i]), rel=0.3)
        # And the exact posterior holds the truth.
        assert truth == pytest.approx(float(mean[i]), abs=3 * float(sd[i]))
