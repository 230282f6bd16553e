"""The loss against Pyro's own subsampled plate, with the same noise."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_lightning import negative_elbo

N, ROWS = 50, torch.tensor([3, 8, 20, 41])
DATA = torch.linspace(-1, 2, N, dtype=torch.float64)


def _likelihood(mu, plate, x):
    with plate:
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


def _prior():
    return pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 0.1))


STYLES = {
    "len": lambda x: pyro.plate("data", len(x)),
    "subsample_size": lambda x: pyro.plate("data", N, subsample_size=len(x)),
    "subsample": lambda x: pyro.plate("data", N, subsample=ROWS),
    "dim": lambda x: pyro.plate("data", len(x), dim=-1),
}


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
@pytest.mark.parametrize("style", STYLES)
def test_loss_and_gradient_equal_pyros_subsampled_plate(style, elbo):
    loc = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def guide(x):
        pyro.sample("mu", dist.Normal(loc, 0.3))

    def ours(x):
        _likelihood(_prior(), STYLES[style](x), x)

    def theirs(x):
        _likelihood(_prior(), pyro.plate("data", N, subsample=ROWS), x)

    x = DATA[ROWS]
    torch.manual_seed(0)
    loss = negative_elbo(elbo, ours, guide, (x,), {}, plates={"data": N}, batch_size=len(x))
    torch.manual_seed(0)
    expected = elbo.differentiable_loss(theirs, guide, x)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradient, expected_gradient = (torch.autograd.grad(v, loc)[0] for v in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=0)


def test_a_plate_of_another_size_is_refused():
    def model(x):
        _likelihood(_prior(), pyro.plate("data", 7), x[:1])

    with pytest.raises(ValueError, match="plate 'data' has size 7"):
        negative_elbo(
            Trace_ELBO(),
            model,
            lambda x: _prior(),
            (DATA[ROWS],),
            {},
            plates={"data": N},
            batch_size=4,
        )


def test_a_model_without_a_data_plate_is_refused():
    def model(x):
        pyro.sample("x", dist.Normal(_prior(), 1.0).expand(x.shape).to_event(1), obs=x)

    with pytest.raises(ValueError, match="no observed site"):
        negative_elbo(
            Trace_ELBO(),
            model,
            lambda x: _prior(),
            (DATA[ROWS],),
            {},
            plates={"data": N},
            batch_size=4,
        )
