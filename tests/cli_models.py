"""What the command line's tests name by class path."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.nn import PyroModule, PyroParam

from pyro_lightning import ArrayDataModule, Prediction, PyroSVIModule

NOISE = 0.5


def regression_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two columns and a response, the same at each call."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 2, generator=generator)
    noise = NOISE * torch.randn(rows, generator=generator)
    return x, x @ torch.tensor([1.0, -0.5]) + noise


class Regression(PyroSVIModule):
    def __init__(self, dim: int = 2, lr: float = 0.05, decay: float = 0.93):
        super().__init__(
            guide=AutoMultivariateNormal,
            elbo=Trace_ELBO(num_particles=20, vectorize_particles=True),
            optimizer=partial(torch.optim.Adam, lr=lr),
            lr_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, decay),
        )
        self.dim = dim

    def model(self, x, y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([self.dim]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


class Rows(ArrayDataModule):
    def __init__(
        self,
        rows: int = 500,
        batch_size: int = 50,
        val_split: float = 0.0,
        test_split: float = 0.0,
    ):
        splits = {"val_split": val_split, "test_split": test_split}
        super().__init__(regression_rows(rows), batch_size, **splits)


def model(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


class Network(PyroModule):
    """A model with an argument of its own."""

    def __init__(self, prior_sd: float = 1.0):
        super().__init__()
        self.prior_sd = prior_sd

    def forward(self, x, y):
        w = pyro.sample("w", dist.Normal(0.0, self.prior_sd).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


class Guide(PyroModule):
    """A guide with arguments of its own, which is no autoguide."""

    def __init__(self, start: float = 0.0, sd: float = 0.1):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.full((2,), start))
        self.sd = PyroParam(torch.full((2,), sd), constraint=dist.constraints.positive)

    def forward(self, x, y):
        pyro.sample("w", dist.Normal(self.loc, self.sd).to_event(1))


def guide(x, y):
    loc = pyro.param("loc", torch.zeros(2))
    pyro.sample("w", dist.Normal(loc, 0.02).to_event(1))


near_zero = partial(AutoMultivariateNormal, init_scale=0.001)


def step_decay(optimizer):
    """Lightning's dict of a scheduler, for a rate that falls with each step."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    return {"scheduler": scheduler, "interval": "step"}


class OwnOptimizer(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Predicted(PyroSVIModule):
    """A subclass whose predictions a configuration describes."""

    def __init__(self, prediction: Prediction | None = None):
        super().__init__(prediction=prediction)
        self.save_hyperparameters()

    def model(self, x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * w).sum(-1), NOISE), obs=y)


class NewRows(ArrayDataModule):
    def __init__(self, rows: int = 100):
        super().__init__(regression_rows(rows), batch_size=30, predict=regression_rows(rows)[:1])
