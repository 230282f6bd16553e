"""Networks that are globals of another Python module, for ``test_closures.py``."""

from types import SimpleNamespace

from torch import nn

net = nn.Linear(2, 1)
held = SimpleNamespace(net=nn.Linear(2, 1))


def predict(x):
    return net(x)
