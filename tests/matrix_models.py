"""Three conjugate models, guides of each kind, their exact posteriors, and draws without chance.

Everything is linear and Normal, so that posteriors and the optima of families are linear algebra,
and noise whose first two moments are those of a Normal gives expectations exactly.
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineAutoregressive
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.nn import AutoRegressiveNN
from torch import nn
from torch.overrides import TorchFunctionMode

N, B = 62, 20  # batches of 20, 20, 20 and 2 rows
PRIORS = {"mu": (0.2, 0.3), "slope": (-0.1, 0.25)}
TAU, SIGMA = 0.8, 0.6


def matrix_rows():
    """A covariate whose mean is not 0, so that intercept and slope are correlated; and values."""
    generator = torch.Generator().manual_seed(11)
    t, noise = torch.randn(2, N, generator=generator, dtype=torch.float64)
    t = 0.5 + 0.5 * t
    return t, 0.8 - 0.6 * t + noise


def model(latents, t, x):
    """``x_i`` about a line (global), about ``z_i`` (local), or about ``z_i`` about it (mixed)."""
    loc = 0.3 * t
    if latents != "local":
        mu, slope = (pyro.sample(name, dist.Normal(*at)) for name, at in PRIORS.items())
        loc = mu + slope * t
    with pyro.plate("data", len(t)):
        if latents != "global":
            loc = pyro.sample("z", dist.Normal(loc, TAU))
        pyro.sample("x", dist.Normal(loc, SIGMA), obs=x)


class Quadratic:
    """The log joint density of a model, ``constant - u P u / 2 + shift u`` in the latents u."""

    def __init__(self, latents, t, x):
        self.names = [] if latents == "local" else list(PRIORS)
        count, rows = len(self.names), 0 if latents == "global" else len(t)
        self.precision = torch.zeros(count + rows, count + rows, dtype=torch.float64)
        self.shift = torch.zeros(count + rows, dtype=torch.float64)
        self.constant = torch.zeros((), dtype=torch.float64)
        for i, (loc, scale) in enumerate(PRIORS[name] for name in self.names):
            self._add(self._unit(i), torch.tensor(loc, dtype=torch.float64), scale)
        for i in range(len(t)):
            line = torch.zeros_like(self.shift)
            if count:
                line[0], line[1] = 1.0, t[i]
            about = torch.zeros_like(t[i]) if count else 0.3 * t[i]
            if rows:
                self._add(self._unit(count + i) - line, about, TAU)
                self._add(self._unit(count + i), x[i], SIGMA)
            else:
                self._add(line, x[i], SIGMA)

    def _unit(self, i):
        return torch.eye(len(self.shift), dtype=torch.float64)[i]

    def _add(self, row, value, scale):
        """Add the log-density of ``Normal(row u, scale)`` at a value."""
        self.precision += row[:, None] * row / scale**2
        self.shift += row * value / scale**2
        self.constant += dist.Normal(0.0, scale).log_prob(value)

    def log_density(self, draws):
        quadratic = ((draws @ self.precision) * draws).sum(-1) / 2
        return self.constant + draws @ self.shift - quadratic

    def optimum(self, family):
        """Mean and covariance at the optimum of KL(q || p) over a family."""
        d, count = len(self.shift), len(self.names)
        mean = torch.linalg.solve(self.precision, self.shift)
        covariance = torch.zeros_like(self.precision)
        if family == "mode":
            return mean, covariance
        blocks = {
            "exact": [list(range(d))],
            "each": [[i] for i in range(d)],
            "parts": [list(range(count)), *([i] for i in range(count, d))],
        }[family]
        for block in filter(None, blocks):
            at = torch.tensor(block)
            inverse = torch.linalg.inv(self.precision[at[:, None], at])
            covariance[at[:, None], at] = inverse
        return mean, covariance

    def log_evidence(self):
        d, log_det = len(self.shift), torch.linalg.slogdet(self.precision).logabsdet
        half = self.shift @ torch.linalg.solve(self.precision, self.shift) / 2
        return (
            self.constant + half + d / 2 * torch.tensor(2 * torch.pi).double().log() - log_det / 2
        )


class Design(TorchFunctionMode):
    """Answers every call for Normal noise from the columns of a Hadamard matrix.

    Their entries are 1 or -1, their means 0, and they are orthogonal: over the K particles the
    noise has mean 0 and covariance 1 exactly, and so has the mean of any quadratic function of it.
    With a ``width`` the draws come one by one, each of that many numbers.
    """

    def __init__(self, count, width=None):
        super().__init__()
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < count:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        self.count, self.width, self.columns, self.used = count, width, matrix[:, 1:], 0

    def __enter__(self):
        self.used = 0
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.normal_:  # what reparametrised draws of torch call
            return args[0].copy_(self._take(args[0].shape))
        if func is torch.normal:  # and those without gradient
            mean, sd = args
            return mean + sd * self._take(mean.shape)
        if func is torch.bernoulli:  # 1 in a share of the particles that is the probability
            (probs,) = args
            places = torch.linspace(0.5, self.count - 0.5, self.count) / self.count
            return (places.reshape(-1, *[1] * (probs.dim() - 1)) < probs).to(probs)
        return func(*args, **(kwargs or {}))

    def _take(self, shape):
        first, size = self.used, shape.numel()
        if self.width:
            self.used += size
            row, column = divmod(first, self.width)
            return self.columns[row, column : column + size].reshape(shape)
        if not shape or shape[0] != self.count:  # one draw, not one of each particle
            return torch.zeros(shape)
        self.used += size // self.count
        assert self.used < self.count, "not enough columns"
        return self.columns[:, first : self.used].reshape(shape)


# -- guides ----------------------------------------------------------------------------------------


def flow(dim):
    network = AutoRegressiveNN(dim, [dim + 4], nonlinearity=nn.Tanh())
    return AffineAutoregressive(network.double())


def guide_list(model, latents):
    guide = AutoGuideList(model)
    if latents != "local":
        guide.append(AutoMultivariateNormal(poutine.block(model, expose=list(PRIORS))))
    if latents != "global":
        guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    return guide


def function_guide(latents):
    """Each latent by itself, those of rows about a line in the row's covariate and value."""

    def guide(t, x):
        positive = constraints.positive
        if latents != "local":
            for name, (loc, scale) in PRIORS.items():
                loc = pyro.param(f"{name}.loc", torch.tensor(loc))
                scale = pyro.param(f"{name}.scale", torch.tensor(scale), constraint=positive)
                pyro.sample(name, dist.Normal(loc, scale))
        if latents != "global":
            weights = pyro.param("weights", torch.tensor([0.1, 0.2, 0.3]))
            scale = pyro.param("scale", torch.tensor(0.5), constraint=positive)
            with pyro.plate("data", len(t)):
                loc = weights[0] + weights[1] * t + weights[2] * x
                pyro.sample("z", dist.Normal(loc, scale))

    return guide


class Amortised(nn.Module):
    """Draws each latent given those before it; those of rows by a network that all rows share."""

    def __init__(self, latents):
        super().__init__()
        self.latents = latents
        if latents != "local":
            self.loc, self.log_scale = (nn.Parameter(torch.full((2,), v)) for v in (0.1, -1.0))
            self.weight = nn.Parameter(torch.tensor(0.1))
        if latents != "global":
            self.net = nn.Linear(2 if latents == "local" else 4, 1)
            self.log_row_scale = nn.Parameter(torch.tensor(-0.5))

    def forward(self, t, x):
        seen = [t, x]
        if self.latents != "local":
            scale = self.log_scale.exp()
            mu = pyro.sample("mu", dist.Normal(self.loc[0], scale[0]))
            slope = pyro.sample("slope", dist.Normal(self.loc[1] + self.weight * mu, scale[1]))
            seen += [mu, slope * t]
        if self.latents != "global":
            with pyro.plate("data", len(t)):
                loc = self.net(torch.stack(torch.broadcast_tensors(*seen), -1)).squeeze(-1)
                pyro.sample("z", dist.Normal(loc, self.log_row_scale.exp()))


def made_of_model(make):
    return lambda model, latents: make(model)


GUIDES = {
    "AutoNormal": made_of_model(AutoNormal),
    "AutoDelta": made_of_model(AutoDelta),
    "AutoDiagonalNormal": made_of_model(AutoDiagonalNormal),
    "AutoMultivariateNormal": made_of_model(AutoMultivariateNormal),
    "AutoLowRank": made_of_model(partial(AutoLowRankMultivariateNormal, rank=1)),
    "AutoIAFNormal": made_of_model(AutoIAFNormal),
    "AutoNormalizingFlow": made_of_model(partial(AutoNormalizingFlow, init_transform_fn=flow)),
    "AutoLaplace": made_of_model(AutoLaplaceApproximation),
    "AutoGaussian": made_of_model(AutoGaussian),
    "AutoStructured": made_of_model(AutoStructured),
    "AutoGuideList": guide_list,
    "function": lambda model, latents: function_guide(latents),
    "nn.Module": lambda model, latents: Amortised(latents),
    "AutoNormalMessenger": made_of_model(AutoNormalMessenger),
    "AutoHierarchical": made_of_model(AutoHierarchicalNormalMessenger),
    "AutoRegressive": made_of_model(AutoRegressiveMessenger),
}
