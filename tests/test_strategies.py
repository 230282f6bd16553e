"""Strategies that spread parameters over processes are refused; the others are not."""

import os

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from support import normal_mean, quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule
from pyro_lightning.strategies import refuse_sharded


@pytest.fixture
def environment():
    """Lightning leaves the address of its process group in the environment of this process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_fit_that_would_shard_parameters_is_refused_before_the_first_step(environment):
    trainer = quiet_trainer(strategy=ModelParallelStrategy(), max_epochs=1)
    svi = PyroSVIModule(normal_mean)
    try:
        with pytest.raises(TypeError, match="ModelParallelStrategy .* Use strategy='ddp'"):
            trainer.fit(svi, datamodule=ArrayDataModule(torch.zeros(4), batch_size=2))
    finally:
        torch.distributed.destroy_process_group()


def test_fsdp_is_refused():
    # Lightning makes no Trainer of it without a GPU.
    with pytest.raises(TypeError, match="FSDPStrategy spreads each parameter over the processes"):
        refuse_sharded(FSDPStrategy())


def test_ddp_is_not_refused():
    refuse_sharded(DDPStrategy())
