"""Steps of Pyro's own SVI beside the same steps of the module, for models of Pyro's examples."""

from contextlib import contextmanager
from functools import partial

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, PyroSVIModule


class BatchPlate:
    """The data plate as the module takes it: over the rows of the batch."""

    def __init__(self, name="data", dim=None):
        self.name, self.dim = name, dim

    def __call__(self, batch):
        return pyro.plate(self.name, len(batch), dim=self.dim)


class InModelPlate:
    """The data plate as Pyro asks for it: over N rows, told which of them are in the batch."""

    def __init__(self, name, size, dim=None):
        self.name, self.size, self.dim, self.rows = name, size, dim, None

    def __call__(self, batch):
        return pyro.plate(self.name, self.size, subsample=self.rows, dim=self.dim)


@contextmanager
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _parameters(run):
    """Unconstrained parameters by the names of the ``pyro.param`` statements that run."""
    with poutine.trace(param_only=True) as tracer:
        run()
    values = {name: site["value"] for name, site in tracer.trace.nodes.items()}
    return {name: getattr(v, "unconstrained", lambda v=v: v)() for name, v in values.items()}


def _copies(tensors):
    return {name: t.detach().clone() for name, t in tensors.items() if t is not None}


def pyro_steps(model, guide, plate, elbo, batches, lr):
    """First gradients, losses and last parameters of raw Pyro; nothing of ours takes part."""
    with pyro.get_param_store().scope():
        svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo)
        plate.rows, batch = batches[0]
        torch.manual_seed(100)
        parameters = _parameters(lambda: elbo.loss(model, guide, *batch))
        torch.manual_seed(0)
        elbo.loss_and_grads(model, guide, *batch)
        gradients = _copies({name: p.grad for name, p in parameters.items()})
        pyro.infer.util.zero_grads(parameters.values())
        losses = []
        for seed, (rows, batch) in enumerate(batches):
            plate.rows = rows
            torch.manual_seed(seed)
            losses.append(svi.step(*batch))
        return gradients, losses, _copies(parameters)


def module_steps(svi, batches, lr):
    """The same of the module, by an optimizer over its ``parameters()``."""
    with pyro.get_param_store().scope():
        batch = batches[0][1]
        torch.manual_seed(100)
        svi.loss(batch)
        parameters = _parameters(lambda: svi.loss(batch))
        optimizer = torch.optim.Adam(svi.parameters(), lr=lr)
        torch.manual_seed(0)
        svi.loss(batch).backward()
        gradients = _copies({name: p.grad for name, p in parameters.items()})
        losses = []
        for seed, (_, batch) in enumerate(batches):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            losses.append(loss := svi.loss(batch))
            loss.backward()
            optimizer.step()
        assert not len(pyro.get_param_store())  # Pyro's store is left alone
        return gradients, [float(loss.detach()) for loss in losses], _copies(parameters)


def assert_same_steps(make, data, *, plate="data", dim=None, elbo=None, batches=None, lr=0.01):
    """Compare the module with raw Pyro: loss and gradients of a batch, then steps of Adam.

    Args:
        make: Called with what makes the data plate of a batch; returns model and guide, always
            with the same initial values.
        data: A tensor or tensors of N rows each.
        plate: Name of the data plate.
        dim: Its dimension, where the model needs to say it.
        elbo: A Pyro ELBO.
        batches: Pairs of row numbers and arguments; four ragged batches of ``data`` by default.
        lr: Learning rate.
    """
    elbo = elbo or Trace_ELBO()
    data = data if isinstance(data, tuple) else (data,)
    size = len(data[0])
    with double_precision():
        if batches is None:
            data = [d.double() if d.is_floating_point() else d for d in data]
            order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
            cuts = order.split(size // 3 - 1)  # three equal batches and a smaller one
            batches = [(rows, tuple(d[rows] for d in data)) for rows in cuts]
        in_model = InModelPlate(plate, size, dim)
        expected = pyro_steps(*make(in_model), in_model, elbo, batches, lr)
        svi = PyroSVIModule(
            *make(BatchPlate(plate, dim)), elbo=elbo, data_plate=plate, dataset_size=size
        )
        actual = module_steps(svi, batches, lr)
    # Both compute the same sums, in another order at most: rounding is all that may differ. Adam
    # divides a gradient by its own size, so the rounding of one that is nearly 0 is blown up; that
    # is what the absolute tolerances are for, against parameters and gradients of about 1.
    assert actual[0].keys() == expected[0].keys() and expected[0]
    assert any(gradient.any() for gradient in expected[0].values())
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-8, atol=0)
    assert actual[2].keys() == expected[2].keys()
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-6, atol=1e-8)


def fit(model, guide, data, *, epochs, lr, batch_size=None, seed=0, **options):
    """Fit by Lightning, by Adam whose rate falls to a hundredth over the epochs.

    ``data`` is a loader, or arrays that are cut into batches.
    """
    torch.manual_seed(seed)
    svi = PyroSVIModule(
        model,
        guide,
        optimizer=partial(torch.optim.Adam, lr=lr),
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.01 ** (1 / epochs)),
        **options,
    )
    loader = data if batch_size is None else ArrayDataModule(data, batch_size).train_dataloader()
    quiet_trainer(max_epochs=epochs).fit(svi, loader)
    return svi
