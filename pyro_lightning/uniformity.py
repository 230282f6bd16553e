"""Ranks of simulation-based calibration: whether they are uniform, and what they say if not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pyro_lightning.arguments import read_count
from pyro_lightning.text_tables import Printable, Printed

REFERENCE = (
    "Talts, Betancourt, Simpson, Vehtari and Gelman 2018, 'Validating Bayesian inference "
    "algorithms with simulation-based calibration', arXiv:1804.06788; Yao et al. 2018, ICML"
)
_HEADINGS = ("site", "entry", "mean", "spread", "p shift", "p spread", "p chi2", "verdict")
LEVEL = 0.01  # of all tests together
LEAST_SAMPLES = 9
_LEAST_IN_BIN = 5


@dataclass(frozen=True)
class RankCheck:
    r"""Three tests of the ranks of one scalar among L draws, over n simulations.

    With :math:`u = (r + 1/2) / (L + 1)` and r uniform on 0, ..., L:

    .. math:: E[u] = \tfrac12, \quad E[(u - \tfrac12)^2] = \tfrac1{12}(1 - (L + 1)^{-2})

    Attributes:
        name: Name of the site.
        entry: Which entry of it.
        mean: Mean of u, 0.5 of a calibrated guide; above, the guide is too low.
        spread: Mean of the squared distance of u from 1/2, over what a calibrated guide has; above
            1 the guide is too narrow.
        p_shift: p-value of the mean, two-sided.
        p_spread: p-value of the spread, two-sided.
        p_chi2: p-value of the counts of ranks in bins of five or more simulations each.
        level: The p-value below which one of these tests is failed.
    """

    name: str
    entry: tuple[int, ...]
    mean: float
    spread: float
    p_shift: float
    p_spread: float
    p_chi2: float
    level: float

    @property
    def p_value(self) -> float:
        """The smallest of the three."""
        return min(self.p_shift, self.p_spread, self.p_chi2)

    @property
    def calibrated(self) -> bool:
        """Whether no test is failed."""
        return self.p_value >= self.level

    @property
    def verdict(self) -> str:
        """What is wrong with the guide, in words."""
        said = []
        if self.p_shift < self.level:
            said.append("too low" if self.mean > 0.5 else "too high")
        if self.p_spread < self.level:
            said.append("too narrow" if self.spread > 1 else "too wide")
        if not said and self.p_chi2 < self.level:
            said.append("another shape")
        return ", ".join(said) or "calibrated"

    def cells(self) -> tuple[str, ...]:
        """What is printed of each attribute."""
        entry = ", ".join(map(str, self.entry)) or "-"
        tests = (f"{p:.2g}" for p in (self.p_shift, self.p_spread, self.p_chi2))
        return (self.name, entry, f"{self.mean:.3f}", f"{self.spread:.2f}", *tests, self.verdict)


@dataclass(frozen=True, repr=False)
class CalibrationCheck(Printable):
    """Whether the posteriors that a module finds are calibrated, over data of its own model.

    Attributes:
        ranks: For each global latent the rank of the true value among the draws of each
            simulation, 0 to L: ``(n, *shape of the site)``.
        num_samples: L.
        checks: The tests of each scalar among them.
    """

    ranks: Mapping[str, torch.Tensor]
    num_samples: int
    checks: tuple[RankCheck, ...]

    @property
    def num_simulations(self) -> int:
        """n, the number of simulations."""
        return len(next(iter(self.ranks.values())))

    @property
    def calibrated(self) -> bool:
        """Whether no test of any scalar is failed."""
        return all(check.calibrated for check in self.checks)

    @property
    def verdict(self) -> str:
        """What the ranks say, in words."""
        count = f"{self.num_simulations:,} simulations"
        failed = [check for check in self.checks if not check.calibrated]
        if not failed:
            return f"calibrated, as far as {count} can tell: all ranks are as uniform ones are"
        worst = min(failed, key=lambda check: check.p_value)
        entry = f"[{', '.join(map(str, worst.entry))}]" if worst.entry else ""
        return (
            f"not calibrated: of {len(self.checks)} scalars {len(failed)} have ranks that are not "
            f"uniform over {count}; at '{worst.name}'{entry} the guide is {worst.verdict} "
            f"(p = {worst.p_value:.1g})"
        )

    def __getitem__(self, name: str) -> RankCheck:
        """Find the check of a site, of its worst entry."""
        found = [check for check in self.checks if check.name == name]
        if not found:
            names = ", ".join(map(repr, self.ranks))
            raise KeyError(f"no global latent '{name}'; there are {names}")
        return min(found, key=lambda check: check.p_value)

    def _printed(self) -> Printed:
        lines = [f"The fit is {self.verdict}.", f"({REFERENCE})"]
        return Printed(_HEADINGS, [self[name].cells() for name in self.ranks], lines)


def check_ranks(ranks: Mapping[str, torch.Tensor], num_samples: int) -> CalibrationCheck:
    """Test ranks for uniformity, at a level of 1 % for all tests together (Bonferroni).

    Args:
        ranks: By site, ``(n, *shape of the site)``, whole numbers from 0 to L.
        num_samples: L, among how many draws.

    Example:
        >>> ranks = torch.arange(100)
        >>> check_ranks({"mu": ranks}, 99).calibrated
        True
        >>> check_ranks({"mu": (ranks < 50) * 99}, 99)["mu"].verdict
        'too narrow'

    Source: Talts et al. 2018, section 4; Yao et al. 2018, section 3, for shift and spread.
    """
    num_samples = read_count(num_samples, "num_samples", LEAST_SAMPLES)
    entries = [
        (name, tuple(int(i) for i in torch.unravel_index(torch.tensor(place), shape)), column)
        for name, found in ranks.items()
        for shape in [found.shape[1:]]
        for place, column in enumerate(found.reshape(len(found), -1).T)
    ]
    level = LEVEL / (3 * max(len(entries), 1))
    checks = (_check(name, at, column, num_samples, level) for name, at, column in entries)
    return CalibrationCheck(dict(ranks), num_samples, tuple(checks))


def _check(
    name: str, entry: tuple[int, ...], ranks: torch.Tensor, num_samples: int, level: float
) -> RankCheck:
    count = num_samples + 1
    places = (torch.arange(count, dtype=torch.double) + 0.5) / count
    uniform = (places - 0.5).square()
    u = (ranks.double() + 0.5) / count
    squares = (u - 0.5).square()
    return RankCheck(
        name=name,
        entry=entry,
        mean=float(u.mean()),
        spread=float(squares.mean() / uniform.mean()),
        p_shift=_two_sided(u.mean() - 0.5, uniform.mean() / len(u)),
        p_spread=_two_sided(
            squares.mean() - uniform.mean(), uniform.var(correction=0) / len(squares)
        ),
        p_chi2=_chi2(ranks, count),
        level=level,
    )


def _two_sided(off: torch.Tensor, variance: torch.Tensor) -> float:
    """Return the p-value of a mean, which is near Normal."""
    return math.erfc(abs(float(off)) / math.sqrt(2 * float(variance)))


def _chi2(ranks: torch.Tensor, count: int) -> float:
    """Return the p-value of Pearson's statistic, in as many bins as hold five each."""
    bins = min(count, len(ranks) // _LEAST_IN_BIN, 20)
    if bins < 2:
        return 1.0
    # Bins of ranks need not be equally wide; each expects what its width says.
    of_rank = torch.arange(count) * bins // count
    expected = torch.bincount(of_rank, minlength=bins).double() * len(ranks) / count
    found = torch.bincount(of_rank[ranks.long()], minlength=bins).double()
    statistic = ((found - expected).square() / expected).sum()
    half = torch.tensor((bins - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(half, statistic / 2))
