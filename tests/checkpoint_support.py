"""Checkpoints of modules that were not fitted, and what is compared of a module and its copy."""

import torch
from support import quiet_trainer

from pyro_lightning import PyroSVIModule


def save(svi, path):
    """Write a checkpoint of a module as a Trainer does that has it."""
    trainer = quiet_trainer()
    trainer.strategy.connect(svi)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def move(svi, seed=0):
    """Give every parameter and buffer another value than it was made with."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*svi.parameters(), *svi.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))


def arguments_of(svi):
    """What made a module of the form with arguments; parts that have not run."""
    plates = dict(svi._data_plates) if svi._columns else list(svi._data_plates) or None
    return {
        "model": svi.model,
        "guide": svi.guide,
        "elbo": svi.elbo,
        "data_plate": plates,
        "scale_sites": svi._scale_sites,
        "checks": svi._checks,
    }


def load_into(fresh, path, **options):
    """Load a checkpoint by what a module that has not run is made of."""
    if type(fresh) is PyroSVIModule:
        return PyroSVIModule.load_from_checkpoint(path, **arguments_of(fresh), **options)
    return type(fresh).load_from_checkpoint(path, **options)


def seeded(run):
    torch.manual_seed(11)
    return run()


def assert_equal_draws(one, other, **options):
    ours, theirs = (seeded(lambda m=m: m.posterior_samples(3, **options)) for m in (one, other))
    assert list(ours) == list(theirs)
    for name, draws in ours.items():
        assert draws.dtype == theirs[name].dtype
        assert torch.equal(draws, theirs[name]), name
