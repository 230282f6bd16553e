"""Whether the iterates of a stochastic optimizer are stationary, and how exact their mean is."""

import math
from typing import NamedTuple

import torch

_WINDOWS = 5  # lengths that are tried


def split_r_hat(iterates: torch.Tensor) -> torch.Tensor:
    r"""Compare the two halves of a series by their means and variances.

    .. math:: \hat R = \sqrt{\frac{n - 1}{n} + \frac{B}{n W}}

    with n the length of a half, B/n the variance of the halves' means and W the mean of their
    variances. It is near 1 where the series is stationary. Of a series that does not move it is 1.

    Args:
        iterates: ``(steps, series)``; of an odd number of steps the first is left out.

    Returns:
        ``(series,)``.

    Example:
        >>> drift = torch.arange(100.0)[:, None]
        >>> round(float(split_r_hat(drift)), 2), float(split_r_hat(torch.ones(100, 1)))
        (2.62, 1.0)

    Source: Gelman et al. 2013, "Bayesian data analysis", section 11.4.
    """
    halves = _halves(iterates)
    n = halves.shape[1]
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)  # B / n
    r_hat = ((n - 1) / n + between / within).sqrt()
    return torch.where((within == 0) & (between == 0), 1.0, r_hat)


def best_r_hat(iterates: torch.Tensor, least: int) -> float | None:
    r"""Largest :func:`split_r_hat` of all series, in that of some last windows where it is least.

    The windows are as long as 95% of the series at most, so that a beginning far away is left out
    of some.

    Args:
        iterates: ``(steps, series)``.
        least: Steps of the shortest window.

    Returns:
        None where the series are too short.

    Source: Welandawe et al. 2022, "Robust, automated, and accurate black-box variational
    inference".
    """
    most = int(0.95 * len(iterates))
    if most < least:
        return None
    lengths = {least + (most - least) * number // (_WINDOWS - 1) for number in range(_WINDOWS)}
    return min(float(split_r_hat(iterates[-length:]).max()) for length in lengths)


def effective_sizes(iterates: torch.Tensor) -> torch.Tensor:
    r"""Count the independent draws whose mean would be as exact as that of a series.

    .. math:: S / \tau, \qquad \tau = -1 + 2 \sum_k (\hat\rho_{2k} + \hat\rho_{2k+1})

    with the autocorrelations of the two halves together, up to where a sum of two is negative, and
    no such sum larger than the one before.

    Args:
        iterates: ``(steps, series)``, S steps; at least 8.

    Returns:
        ``(series,)``.

    Example:
        >>> noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
        >>> 3000 < float(effective_sizes(noise)) < 5000
        True

    Source: Geyer 1992, "Practical Markov chain Monte Carlo"; Vehtari et al. 2021,
    "Rank-normalization, folding, and localization".
    """
    halves = _halves(iterates)
    n, total = halves.shape[1], 2 * halves.shape[1]
    centred = halves - halves.mean(1, keepdim=True)
    power = torch.fft.rfft(centred, n=2 * n, dim=1).abs() ** 2
    covariances = torch.fft.irfft(power, n=2 * n, dim=1)[:, :n].mean(0) / n
    within = covariances[0] * n / (n - 1)
    both = covariances[0] + halves.mean(1).var(0)
    still = both == 0
    correlations = 1.0 - (within - covariances) / torch.where(still, 1.0, both)
    correlations[0] = 1.0
    pairs = correlations[0 : n // 2 * 2 : 2] + correlations[1 : n // 2 * 2 : 2]
    positive = (pairs > 0).cumprod(0)
    pairs = (pairs * positive).cummin(0).values
    tau = (2.0 * pairs.sum(0) - 1.0).clamp(min=1.0 / torch.tensor(float(total)).log10().item())
    return torch.where(still, float(total), total / tau)


class Exactness(NamedTuple):
    """How exact the means of series are, at worst.

    Attributes:
        ess: Least effective sample size of those whose mean is in doubt.
        mcse: Largest standard error of a mean, in units of the series.
    """

    ess: float
    mcse: float


def exactness(iterates: torch.Tensor, units: torch.Tensor, mcse: float) -> Exactness:
    r"""Judge the means of series by their Monte Carlo standard errors.

    .. math:: \text{MCSE} = \text{sd} / \sqrt{\text{ESS}}

    A series that moves by less than ``mcse`` of its unit in all has a mean that is exact enough,
    whatever its effective sample size. One without a unit (NaN) has an effective sample size alone.

    Args:
        iterates: ``(steps, series)``.
        units: ``(series,)``.
        mcse: The error that is allowed, in units.
    """
    sizes, sds = effective_sizes(iterates), iterates.std(0) / units
    errors = torch.where(units.isnan(), 0.0, sds / sizes.sqrt())
    doubted = sizes[~(sds <= mcse)]
    return Exactness(float(doubted.min()) if len(doubted) else math.inf, float(errors.max()))


def _halves(iterates: torch.Tensor) -> torch.Tensor:
    half = len(iterates) // 2
    return iterates[len(iterates) - 2 * half :].reshape(2, half, -1)


class Trail:
    """A series of bounded length: once full, it keeps every second entry, and of those to come.

    Args:
        capacity: How many entries it may hold, an even number.

    Attributes:
        interval: How many entries come for one that is kept.

    Example:
        >>> trail = Trail(4)
        >>> kept = [trail.add(torch.tensor([float(number)])) for number in range(7)]
        >>> trail.values().flatten().tolist(), trail.interval
        ([0.0, 2.0, 4.0, 6.0], 2)
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.interval = 1
        self._came = self._held = 0
        self._room: torch.Tensor | None = None

    def add(self, entry: torch.Tensor) -> bool:
        """Keep an entry, if it is due; tells whether it was."""
        due = self.comes()
        if due:
            self.keep(entry)
        return due

    def comes(self) -> bool:
        """Count an entry that comes; tells whether it is due, and has to be given to `keep`."""
        due = self._came % self.interval == 0
        self._came += 1
        return due

    def keep(self, entry: torch.Tensor) -> None:
        """Keep the entry that came last."""
        if self._held == self.capacity:
            assert self._room is not None
            self._held //= 2
            self._room[: self._held] = self._room[::2].clone()
            # This entry's number is a multiple of it, the capacity being even.
            self.interval *= 2
        if self._room is None:
            self._room = entry.new_empty((self.capacity, *entry.shape))
        self._room[self._held] = entry
        self._held += 1

    def __len__(self) -> int:
        return self._held

    def values(self) -> torch.Tensor:
        """Return what is held, ``(entries, *shape)``."""
        return torch.empty(0, 0) if self._room is None else self._room[: self._held]

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """Return what a checkpoint keeps."""
        return {"values": self.values().clone(), "interval": self.interval, "came": self._came}

    def to(self, device: torch.device) -> None:
        """Move what is held to a device."""
        self._room = None if self._room is None else self._room.to(device)

    def load_state_dict(self, state: dict[str, torch.Tensor | int]) -> None:
        """Go on from what a checkpoint kept."""
        values = state["values"]
        assert isinstance(values, torch.Tensor)
        self.interval, self._came, self._held = int(state["interval"]), int(state["came"]), 0
        self._room = None
        if len(values):
            self._room = values.new_empty((self.capacity, *values.shape[1:]))
            self._room[: len(values)] = values
            self._held = len(values)
