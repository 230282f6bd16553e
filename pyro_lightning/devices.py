"""Priors on the module's device, whether they were built there or not."""

import copy
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch.distributions import Distribution

from pyro_lightning.handlers import is_subsample


def on_device(fn: Any, device: torch.device) -> Any:
    """Return a distribution with its tensors, and those of its parts, on a device.

    Example:
        >>> import pyro.distributions as dist
        >>> prior = dist.Normal(0., 1.).expand([3]).to_event(1)
        >>> on_device(prior, torch.device("meta")).base_dist.loc.device
        device(type='meta')
    """
    if isinstance(fn, torch.Tensor):
        return fn if fn.device == device else fn.to(device)
    if not isinstance(fn, Distribution):
        return fn
    state = {name: on_device(value, device) for name, value in fn.__dict__.items()}
    if all(new is fn.__dict__[name] for name, new in state.items()):
        return fn
    moved = copy.copy(fn)
    moved.__dict__.update(state)
    return moved


class DeviceMessenger(Messenger):
    """Moves the distributions of sample sites to a device.

    ``PyroSample(dist.Normal(0., 1.))`` makes its tensors when the model is built, on the CPU, and
    they are no buffers, so that ``module.to("cuda")`` leaves them there.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def _pyro_sample(self, msg: Any) -> None:
        if not is_subsample(msg):
            msg["fn"] = on_device(msg["fn"], self.device)
