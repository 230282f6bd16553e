"""Train Pyro models on mini-batches with PyTorch Lightning, and get the full-data posterior."""

from pyro_lightning.elbo import negative_elbo
from pyro_lightning.handlers import DataPlateMessenger

__all__ = ["DataPlateMessenger", "negative_elbo"]
