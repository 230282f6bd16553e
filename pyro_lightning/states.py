"""Leaving random states and buffers as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def preserved_buffers(module: nn.Module) -> Iterator[None]:
    """Put back the buffers of a module, such as the running statistics of BatchNorm."""
    buffers = {
        name: buffer.clone() for name, buffer in module.named_buffers() if not is_lazy(buffer)
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


@contextmanager
def preserved_state(module: nn.Module) -> Iterator[None]:
    """Put back the random states of Python, NumPy and torch, and the buffers of a module."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), preserved_buffers(module):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
