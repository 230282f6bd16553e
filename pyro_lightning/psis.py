"""Pareto-smoothed importance weights: whether a guide is close enough to be corrected."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from pyro_lightning.arviz_apis import psislw

REFERENCE = (
    "Yao, Vehtari, Simpson and Gelman 2018, 'Yes, but did it work?: Evaluating variational "
    "inference', ICML; Vehtari et al. 2024, 'Pareto smoothed importance sampling', JMLR 25(72)"
)
GOOD, RELIABLE = 0.5, 0.7
_EQUAL = 1e-6  # nats between log weights that only rounding tells apart
_UNDERFLOW = -700.0  # below which a weight is 0 beside the largest
LEAST_DRAWS = 100  # whose largest 20 the tail is fitted to


class Smoothed(NamedTuple):
    """Importance weights of S draws.

    Attributes:
        weights: Smoothed and normalised, ``(S,)``, in double precision on the CPU: their sum is 1.
        k: Pareto k-hat, the shape of the tail of the weights; minus infinity where the largest are
            equal, infinity where all but a few are 0.
    """

    weights: torch.Tensor
    k: float

    @property
    def effective_size(self) -> float:
        """How many independent draws of the posterior the weighted draws are worth.

        .. math:: 1 / \\sum_s w_s^2
        """
        return float(1 / self.weights.square().sum())


def smooth(log_weights: torch.Tensor) -> Smoothed:
    r"""Smooth importance weights, whose logarithms are known up to a constant.

    .. math:: w_s \propto p(x, \theta_s) / q(\theta_s), \quad \theta_s \sim q

    Args:
        log_weights: Of S independent draws, ``(S,)``.

    Raises:
        ValueError: For fewer than 100 draws, for NaN, and where all weights are zero.
        ImportError: Where ArviZ, which fits the tail, is not installed.

    Example:
        >>> smooth(torch.zeros(100)).k
        -inf

    Source: Vehtari et al. 2024, "Pareto smoothed importance sampling", JMLR 25(72).
    """
    values: np.ndarray[Any, Any] = log_weights.detach().double().cpu().numpy()
    if values.ndim != 1 or len(values) < LEAST_DRAWS:
        raise ValueError(
            f"log_weights must be of at least {LEAST_DRAWS} draws, in one dimension; got the shape "
            f"{tuple(values.shape)}"
        )
    top = values.max()
    if not math.isfinite(top):
        raise ValueError(f"log_weights must not be NaN, nor all of them -inf; the largest is {top}")
    # ArviZ fits a tail of so many. It refuses one without width, of equal weights or a discrete
    # latent, and is silent where most of it is 0 in double precision: 1.x has a k-hat of 0.05 then.
    tail = math.ceil(min(len(values) / 5, 3 * len(values) ** 0.5)) + 1
    least = np.sort(values)[-tail] - top
    if least > -_EQUAL or least < _UNDERFLOW:
        raw = torch.from_numpy(values).softmax(0)
        return Smoothed(raw, math.inf if least < _UNDERFLOW else -math.inf)
    smoothed, k = psislw(values - top)
    return Smoothed(torch.from_numpy(np.exp(smoothed)), k)


def threshold(num_samples: int) -> float:
    r"""Return the k-hat from which on the weights of S draws cannot be relied on.

    .. math:: \min(1 - 1 / \log_{10} S, 0.7)

    Example:
        >>> round(threshold(100), 3), threshold(10_000)
        (0.5, 0.7)

    Source: Vehtari et al. 2024, section 3.
    """
    return min(1 - 1 / math.log10(num_samples), RELIABLE)


def verdict(k: float, num_samples: int) -> tuple[bool, str]:
    """Judge a k-hat; returns whether weighted draws can be relied on, and the words for it.

    It judges the weights. Those of a guide that is too wide are good, too; its draws are not.

    Example:
        >>> verdict(0.6, 10_000)[1].split(":")[0]
        'usable'
    """
    limit = threshold(num_samples)
    if k < min(GOOD, limit):
        return True, "good: weighted draws of the guide can be relied on"
    if k < limit:
        return True, "usable: weighted draws of the guide can be relied on, with a larger error"
    needed = 10 ** (1 / (1 - k)) if k < RELIABLE else math.inf
    if needed < math.inf:
        return False, (
            f"not reliable: for k-hat = {k:.2f} at least {math.ceil(needed):,} draws are needed; "
            "take more"
        )
    how = "few draws have most of the weight" if k < 1 else "the weights have no mean"
    return False, (
        f"bad: guide and posterior are far apart ({how}), and neither the guide's draws nor "
        "weighted ones should be relied on. Train longer, take a richer guide, such as "
        "AutoMultivariateNormal or a flow, or write the model in other parameters"
    )
