"""What several tests share: a quiet Trainer, and models with a known posterior."""

from typing import Any

import pyro
import pyro.distributions as dist
from lightning.pytorch import Trainer


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer on the CPU that prints and writes nothing unless told to."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **options})


def normal_mean(x):
    """Mean of a Normal: prior N(0, 0.1), unit noise. Posterior N(sum(x) / (100 + N), ...)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
