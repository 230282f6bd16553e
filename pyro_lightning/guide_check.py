"""Is the fit to be trusted: the guide against its own importance-weighted draws."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, log, prod
from typing import TYPE_CHECKING, Any

import torch

from pyro_lightning.arguments import read_count
from pyro_lightning.log_weights import LogWeights, compute_log_weights
from pyro_lightning.psis import LEAST_DRAWS, REFERENCE, Smoothed, smooth, verdict
from pyro_lightning.text_tables import rich_table, text_table

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = (
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
LARGEST_ERROR = 0.5  # nats of a log weight, beyond which k-hat is that of the error


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
        """The entry that is furthest off."""
        shift, ratio = self._least
        off = torch.maximum(self.shift.abs() / shift, self.sd_ratio.log().abs() / ratio)
        place = int(off.nan_to_num(nan=-1.0, posinf=torch.inf).argmax())
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
        if not isfinite(ratio):  # one draw has all the weight
            return "cannot tell"
        least_shift, least_ratio = self._least
        said = []
        if abs(shift) > least_shift:
            said.append(f"too {'high' if shift > 0 else 'low'} by {abs(shift):.2g} sd")
        if abs(log(ratio)) > least_ratio:
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


@dataclass(frozen=True)
class GuideCheck:
    r"""Whether a guide is to be trusted, by the importance weights of its draws.

    A guide that covers the posterior has weights

    .. math:: w_s \propto p(x, \theta_s) / q(\theta_s), \quad \theta_s \sim q

    with a light tail. Pareto k-hat is the shape of that tail: below 0.5 weighted draws are good, up
    to :math:`\min(1 - 1/\log_{10} S, 0.7)` usable, and above neither they nor the guide's own can
    be relied on. It speaks for all latents together. A guide that is too wide has good weights, and
    shows in the table, which compares its marginals with the weighted ones. A mode that no draw of
    the guide came near shows in none of these numbers.

    Attributes:
        k: Pareto k-hat.
        num_samples: S.
        draws: Draws of the guide by site.
        weights: Their smoothed weights, ``(S,)``, which sum to 1.
        log_weights: The logarithms of the raw ones, a sum over N observations in nats.
        standard_error: Of what tells the log weights apart, in nats, where only some rows were
            seen at each draw; 0 otherwise.
        rows: At how many rows each draw was evaluated.
        sites: The guide's marginals against the weighted draws, a :class:`SiteCheck` for each.

    Source: Yao, Vehtari, Simpson and Gelman 2018, "Yes, but did it work?: Evaluating variational
    inference".
    """

    k: float
    draws: Mapping[str, torch.Tensor]
    weights: torch.Tensor
    log_weights: torch.Tensor
    standard_error: float
    rows: int
    sites: tuple[SiteCheck, ...]

    @property
    def num_samples(self) -> int:
        """S, the number of draws."""
        return len(self.weights)

    @property
    def effective_size(self) -> float:
        """How many draws of the posterior the weighted draws are worth."""
        return float(1 / self.weights.square().sum())

    @property
    def reliable(self) -> bool:
        """Whether weighted draws can be relied on."""
        return is_reliable(self.k, self.num_samples, self.standard_error)

    @property
    def agrees(self) -> bool:
        """Whether they can, and the guide's mean and sd of every latent are those of them."""
        return self.reliable and not self._off()

    def _off(self) -> list[str]:
        return [repr(each.name) for each in self.sites if each.verdict not in ("agrees", "a point")]

    @property
    def verdict(self) -> str:
        """What k-hat and the table say, in words."""
        if self.standard_error > LARGEST_ERROR:
            return (
                f"unknown: from {self.rows:,} rows a log weight has a standard error of "
                f"{self.standard_error:.2g} nats, and k-hat is that of this error. Take a larger "
                f"max_rows, about {self._rows_needed():,}, or all rows"
            )
        reliable, words = verdict(self.k, self.num_samples)
        if not reliable:
            return words
        if off := self._off():
            return (
                "usable, with weights: weighted draws can be relied on, but the guide's own are "
                f"off at {', '.join(off)}. Use resample(), train longer, or take a richer guide"
            )
        return f"{words}, and its own mean and sd of each latent agree with them"

    def resample(self, num_samples: int) -> dict[str, torch.Tensor]:
        """Draw among the guide's draws by their weights, with replacement.

        Where the check is reliable these are draws of the posterior, worth as many independent ones
        as :attr:`effective_size` at most.

        Args:
            num_samples: How many.

        Returns:
            ``(num_samples, *shape of the site)`` by site, on the device of the draws.
        """
        num_samples = read_count(num_samples, "num_samples")
        places = torch.multinomial(self.weights, num_samples, replacement=True)
        return {name: draw[places.to(draw.device)] for name, draw in self.draws.items()}

    def _rows_needed(self) -> int:
        return round(self.rows * (self.standard_error / LARGEST_ERROR) ** 2)

    def __getitem__(self, name: str) -> SiteCheck:
        """Find a site by name."""
        for site in self.sites:
            if site.name == name:
                return site
        names = ", ".join(repr(site.name) for site in self.sites)
        raise KeyError(f"no global latent '{name}'; there are {names}")

    def _lines(self) -> list[str]:
        uncertain = [
            "The weighted columns are uncertain themselves: they show a direction, no size."
        ]
        return [
            f"Pareto k-hat {self.k:.2f} of {self.num_samples:,} draws: {self.verdict}.",
            f"The weighted draws are worth {self.effective_size:,.0f} of the posterior.",
            *([] if self.reliable else uncertain),
            f"({REFERENCE})",
        ]

    def __str__(self) -> str:
        table = text_table(_HEADINGS, [site.cells() for site in self.sites])
        return "\n".join([table, *self._lines()])

    __repr__ = __str__

    def __rich__(self) -> "Table":
        """Render as a table of rich: ``rich.print(check)``."""
        cells = [site.cells() for site in self.sites]
        return rich_table(_HEADINGS, cells, "\n".join(self._lines()))


def check_guide(
    module: Any, batches: Iterable[Any], num_samples: int = 1000, max_rows: int | None = None
) -> GuideCheck:
    """Check a guide by the importance weights of its draws.

    Args:
        module: A ``PyroSVIModule`` that has trained.
        batches: All N rows of the training set, once each, on the module's device.
        num_samples: S.
        max_rows: About how many rows each draw is evaluated at; None for all.

    Raises:
        ValueError: For fewer than 100 draws, and as
            :func:`pyro_lightning.log_weights.compute_log_weights` does.
        ImportError: Where ArviZ, which fits the tail, is not installed.
    """
    num_samples = read_count(num_samples, "num_samples", LEAST_DRAWS)
    if max_rows is not None:
        max_rows = read_count(max_rows, "max_rows")
    return judge(compute_log_weights(module, batches, num_samples, max_rows))


def judge(found: LogWeights) -> GuideCheck:
    """Compare draws with the same draws weighted.

    Example:
        >>> theta = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1000) + 0.5) / 1000)
        >>> check = judge(LogWeights({"theta": theta}, torch.zeros(1000), 0.0, 50))
        >>> check["theta"].verdict, check.k
        ('agrees', -inf)
    """
    smoothed = smooth(found.log_weights)
    reliable = is_reliable(smoothed.k, len(smoothed.weights), found.standard_error)
    sites = tuple(
        _compare(name, draw, smoothed, reliable)
        for name, draw in found.draws.items()
        if prod(draw.shape)
    )
    return GuideCheck(
        k=smoothed.k,
        draws=found.draws,
        weights=smoothed.weights,
        log_weights=found.log_weights,
        standard_error=found.standard_error,
        rows=found.rows,
        sites=sites,
    )


def is_reliable(k: float, num_samples: int, standard_error: float) -> bool:
    """Whether draws with weights of this k-hat, known with this error in nats, can be relied on."""
    return standard_error <= LARGEST_ERROR and verdict(k, num_samples)[0]


def _compare(name: str, draws: torch.Tensor, smoothed: Smoothed, reliable: bool) -> SiteCheck:
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
