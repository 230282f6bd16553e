"""The guide's marginal of one latent against its importance-weighted draws."""

from dataclasses import dataclass
from math import log

import torch

from pyro_lightning.psis import Smoothed

HEADINGS = (
    "site",
    "entry",
    "guide mean",
    "guide sd",
    "weighted mean",
    "weighted sd",
    "shift",
    "sd ratio",
    "verdict",
)
_SHIFT, _RATIO = 0.2, 1.25  # sds and times sd from which on a difference matters
_ERRORS = 3.0  # standard errors from which on it is none of chance


@dataclass(frozen=True)
class SiteCheck:
    r"""The guide's marginal of a global latent, against its importance-weighted draws.

    Attributes:
        name: Name of the site.
        guide_mean: Mean of the draws of the guide, of the site's shape.
        guide_sd: Their sd.
        weighted_mean: Mean of the draws by their smoothed weights: an estimate of the posterior's.
        weighted_sd: Their sd by these weights.
        effective_size: How many draws the weighted ones are worth.
        reliable: Whether k-hat lets the weighted draws be relied on.
    """

    name: str
    guide_mean: torch.Tensor
    guide_sd: torch.Tensor
    weighted_mean: torch.Tensor
    weighted_sd: torch.Tensor
    effective_size: float
    reliable: bool = True

    @property
    def shift(self) -> torch.Tensor:
        """How far the guide's mean is off, in weighted sds."""
        return (self.guide_mean - self.weighted_mean) / self.weighted_sd

    @property
    def sd_ratio(self) -> torch.Tensor:
        """The guide's sd over the weighted one: below 1 where the guide is too narrow."""
        return self.guide_sd / self.weighted_sd

    @property
    def _least(self) -> tuple[float, float]:
        """Shift, and logarithm of the sd's ratio, from which on they say something."""
        error = self.effective_size**-0.5
        return max(_SHIFT, _ERRORS * error), max(log(_RATIO), _ERRORS * error * 0.5**0.5)

    @property
    def worst(self) -> tuple[int, ...]:
        """The entry that is furthest off; of weights without reliance the narrowest."""
        shift, ratio = self._least
        off = -self.sd_ratio.log()
        if self.reliable:
            off = torch.maximum(self.shift.abs() / shift, off.abs() / ratio)
        place = int(off.nan_to_num(nan=-torch.inf, posinf=torch.inf).argmax())
        return tuple(int(i) for i in torch.unravel_index(torch.tensor(place), off.shape))

    @property
    def agrees(self) -> bool:
        """Whether mean and sd of all entries are as the weighted draws have them."""
        return self.verdict == "agrees"

    @property
    def verdict(self) -> str:
        """What is wrong with the entry that is furthest off, in words."""
        if not self.guide_sd.any():
            return "a point"
        shift, ratio = float(self.shift[self.worst]), float(self.sd_ratio[self.worst])
        least_shift, least_ratio = self._least
        said = []
        # A few draws with all the weight are narrower than the posterior and somewhere in it: by
        # them a guide can be too narrow, and nothing else.
        if self.reliable and abs(shift) > least_shift:
            said.append(f"too {'high' if shift > 0 else 'low'} by {abs(shift):.2g} sd")
        if log(ratio) < -least_ratio or (self.reliable and log(ratio) > least_ratio):
            said.append(f"too {'wide' if ratio > 1 else 'narrow'}: {ratio:.2g} of the sd")
        return ", ".join(said) or ("agrees" if self.reliable else "cannot tell")

    def cells(self) -> tuple[str, ...]:
        """What is printed of each attribute, of the entry that is furthest off."""
        at = self.worst
        numbers = (
            self.guide_mean,
            self.guide_sd,
            self.weighted_mean,
            self.weighted_sd,
            self.shift,
            self.sd_ratio,
        )
        entry = ", ".join(map(str, at)) or "-"
        cells = (f"{float(each[at]):.4g}" for each in numbers)
        return (self.name, entry, *cells, self.verdict)


def compare(name: str, draws: torch.Tensor, smoothed: Smoothed, reliable: bool) -> SiteCheck:
    """Compare draws of a site with the same draws weighted.

    Args:
        name: Name of the site.
        draws: ``(S, *shape of the site)``.
        smoothed: Their weights.
        reliable: Whether these can be relied on.
    """
    values = draws.detach().double().cpu()
    weights = smoothed.weights.reshape(-1, *[1] * (values.dim() - 1))
    points = (values == values[0]).all(0)
    mean = torch.where(points, values[0], (weights * values).sum(0))
    return SiteCheck(
        name=name,
        guide_mean=torch.where(points, values[0], values.mean(0)),
        guide_sd=values.std(0, correction=0).masked_fill(points, 0.0),
        weighted_mean=mean,
        weighted_sd=(weights * (values - mean).square()).sum(0).sqrt(),
        effective_size=smoothed.effective_size,
        reliable=reliable,
    )
