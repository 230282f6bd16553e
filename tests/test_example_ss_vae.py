"""Pyro's semi-supervised VAE: few images have labels; the guide's labels are summed out."""

import pyro
import pyro.distributions as dist
import torch
from example_support import BatchPlate, assert_same_steps, fit
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

AUX, KNOWN = 3.0, 20
CLASSES, PIXELS, LATENT, HIDDEN = 3, 20, 2, 32
PROTOTYPES = torch.tensor([[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]])
PROTOTYPES = PROTOTYPES.repeat_interleave(PIXELS // 4, dim=-1)


def images(count, seed):
    """Pixels that lean towards a prototype of the class, and all follow a style."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    style = torch.randn(count, 1, generator=generator)
    logits = 1.5 * PROTOTYPES[labels] + style
    return (torch.rand(logits.shape, generator=generator) < logits.sigmoid()).float(), labels


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, outputs))


class SSVAE(nn.Module):
    """Model and guide of a batch whose labels are all known, or all unknown (None)."""

    def __init__(self, plate):
        super().__init__()
        self.plate = plate
        self.decoder = network(LATENT + CLASSES, PIXELS)
        self.encode_y = network(PIXELS, CLASSES)
        self.encode_z = network(PIXELS + CLASSES, 2 * LATENT)

    def model(self, x, y=None):
        pyro.module("ss_vae", self)
        with self.plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), LATENT), 1.0).to_event(1))
            known = y
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(len(x), CLASSES)), obs=y)
            y = y.expand(*z.shape[:-1], CLASSES)
            logits = self.decoder(torch.cat([z, y], dim=-1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)
            if known is not None:  # the example's auxiliary loss, by which the classifier learns
                with poutine.scale(scale=AUX):
                    classifier = dist.OneHotCategorical(logits=self.encode_y(x))
                    pyro.sample("classified", classifier, obs=known)

    def guide(self, x, y=None):
        with self.plate(x):
            if y is None:
                y = pyro.sample("y", dist.OneHotCategorical(logits=self.encode_y(x)))
            x = x.expand(*y.shape[:-1], PIXELS)
            loc, log_scale = self.encode_z(torch.cat([x, y], dim=-1)).chunk(2, dim=-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def make(plate):
    torch.manual_seed(0)
    parts = SSVAE(plate)
    return parts.model, config_enumerate(parts.guide, "parallel", expand=True)


def elbo():
    return TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)


def test_same_steps_as_pyro():
    x, labels = images(24, seed=0)
    x, y = x.double(), one_hot(labels, CLASSES).double()
    kinds = [(torch.arange(9), True), (torch.arange(9, 18), False)] * 2
    batches = [(rows, (x[rows], y[rows]) if known else (x[rows],)) for rows, known in kinds]
    assert_same_steps(make, x, elbo=elbo(), batches=batches)


def as_batch(rows):
    """Rows of one kind each, as the batch sampler cuts them; -1 is no label."""
    x, labels = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"x": x} if (labels < 0).all() else {"x": x, "y": one_hot(labels, CLASSES).float()}


def test_unlabelled_images_help_to_classify_held_out_ones():
    x, labels = images(800, seed=1)
    test, truth = images(1000, seed=2)
    known = labels.clone()
    known[KNOWN:] = -1
    first, others = torch.arange(KNOWN), torch.arange(KNOWN, 800)
    accuracy = {}
    for name, batches in (
        ("all images", [*others.split(40)] + [first] * 4),
        ("labelled alone", [first] * 24),
    ):
        loader = DataLoader(
            TensorDataset(x, known), batch_sampler=[*map(list, batches)], collate_fn=as_batch
        )
        model, guide = make(BatchPlate())
        fit(model, guide, loader, epochs=30, lr=0.01, elbo=elbo(), dataset_size=800)
        classified = model.__self__.encode_y(test).argmax(-1)
        accuracy[name] = float((classified == truth).double().mean())
    # Knowing the model, 94.9 % of these images can be told right (a sum over styles on a grid).
    # With five seeds all images reach 94.9 to 95.5 %, the labelled alone 91 to 92 %.
    assert accuracy["all images"] > 0.94
    assert accuracy["labelled alone"] < 0.93
