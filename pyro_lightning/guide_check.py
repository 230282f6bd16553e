"""Is the fit to be trusted: the guide against its own importance-weighted draws."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from pyro_lightning.arguments import read_count
from pyro_lightning.log_weights import LogWeights, compute_log_weights
from pyro_lightning.psis import LEAST_DRAWS, REFERENCE, smooth, verdict
from pyro_lightning.site_check import HEADINGS, SiteCheck, compare
from pyro_lightning.text_tables import Printable, Printed

LARGEST_ERROR = 0.5  # nats of a log weight, beyond which k-hat is that of the error


@dataclass(frozen=True, repr=False)
class GuideCheck(Printable):
    r"""Whether a guide is to be trusted, by the importance weights of its draws.

    A guide that covers the posterior has weights

    .. math:: w_s \propto p(x, \theta_s) / q(\theta_s), \quad \theta_s \sim q

    with a light tail. Pareto k-hat is the shape of that tail: below 0.5 weighted draws are good, up
    to :math:`\min(1 - 1/\log_{10} S, 0.7)` usable, and above neither they nor the guide's own can
    be relied on. It speaks for all latents together. A guide that is too wide has good weights, and
    shows in the table, which compares its marginals with the weighted ones. Of many latents, a
    hundred or so, small errors of each add up to a large k-hat though the marginals may be fine;
    :func:`pyro_lightning.simulation_based_calibration` tells of these. A mode that no draw of the
    guide came near shows in none of these numbers.

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

    def _narrow(self) -> list[str]:
        return [repr(each.name) for each in self.sites if "too narrow" in each.verdict]

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
        if narrow := self._narrow():
            return (
                "usable, with weights, only as far as the guide's own draws reach: it is too "
                f"narrow at {', '.join(narrow)}, and where it draws nothing no weight can tell by "
                "how much. Take a richer guide, or train longer"
            )
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

    def _printed(self) -> Printed:
        uncertain = [
            "The weighted columns are of few draws, and narrower than the posterior: by them a "
            "guide can be told to be too narrow, and nothing else."
        ]
        lines = [
            f"Pareto k-hat {self.k:.2f} of {self.num_samples:,} draws: {self.verdict}.",
            f"The weighted draws are worth {self.effective_size:,.0f} of the posterior.",
            *([] if self.reliable else uncertain),
            f"({REFERENCE})",
        ]
        return Printed(HEADINGS, [site.cells() for site in self.sites], lines)


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
        compare(name, draw, smoothed, reliable)
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
