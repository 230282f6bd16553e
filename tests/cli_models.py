"""What the command line's tests name by class path."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

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
    def __init__(self, rows: int = 500, batch_size: int = 50, val_split: float = 0.0):
        super().__init__(regression_rows(rows), batch_size=batch_size, val_split=val_split)


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
