"""`Prediction`: what is predicted, and what is kept of the draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import torch

from pyro_lightning.arguments import read_choice, read_count, read_flag, read_number, shortly
from pyro_lightning.plates import read_names

MEAN, SD = "mean", "sd"
# No str, as which a command line would take a number.
Statistic = Literal["mean", "sd"] | float


@dataclass(frozen=True)
class Prediction:
    """What ``trainer.predict`` draws of each batch, and what it keeps.

    Args:
        num_samples: S, how many draws.
        sites: Which sites in the data plate; by default the observed ones and
            ``pyro.deterministic`` statements.
        summary: What is kept of the draws: ``"mean"``, ``"sd"`` (over S - 1), and quantiles as
            numbers in [0, 1]; by default the draws themselves.
        chunk_size: How many draws are run together, so that memory beside the result grows with
            ``chunk_size`` times B; by default 2^18 / B.
        parallel: Whether draws of a chunk are one run of model and guide. None does so where it is
            the same, which is tried on the first batch.
        local: ``"guide"`` draws latents of rows from the guide where it knows these rows;
            ``"prior"`` all of them from the prior given the globals.
        seed: What all random numbers follow from, with rank and number of the batch; by default
            torch's default generator.

    Raises:
        TypeError: When a field is of a kind that cannot serve.
        ValueError: For a number or name that is none of those that are served.

    Example:
        >>> Prediction(num_samples=500, summary=["mean", 0.05, 0.95]).labels
        ('mean', '0.05', '0.95')
    """

    num_samples: int = 1000
    sites: str | Sequence[str] | None = None
    summary: Statistic | Sequence[Statistic] | None = None
    chunk_size: int | None = None
    parallel: bool | None = None
    local: str = "guide"
    seed: int | None = None

    def __post_init__(self) -> None:
        # Read once: a frozen dataclass has no other way to set what it holds.
        put = object.__setattr__
        put(self, "num_samples", read_count(self.num_samples, "num_samples"))
        put(self, "sites", read_names(self.sites, "sites") or None)
        put(self, "summary", _read_summary(self.summary))
        if self.chunk_size is not None:
            put(self, "chunk_size", read_count(self.chunk_size, "chunk_size"))
        if self.parallel is not None:
            read_flag(self.parallel, "parallel")
        read_choice(self.local, "local", ("guide", "prior"))
        if self.seed is not None:
            put(self, "seed", read_count(self.seed, "seed", 0))
        if self.summary is not None and SD in self.summary and self.num_samples < 2:  # type: ignore[operator]
            raise ValueError("the sd of draws needs num_samples of 2 at least")

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of what is kept of the draws; None for the draws themselves."""
        return None if self.summary is None else tuple(map(str, self.summary))  # type: ignore[arg-type]

    def kept(self, draws: torch.Tensor) -> torch.Tensor:
        """Summarise draws, ``(S, ...)``: ``(len(summary), ...)``, or the draws themselves."""
        return draws if self.summary is None else summarised(draws, self.summary)  # type: ignore[arg-type]


class PredictionFields(TypedDict, total=False):
    """The fields of a :class:`Prediction`, as a dict holds them: a command line refuses others."""

    num_samples: int
    sites: str | Sequence[str] | None
    summary: Statistic | Sequence[Statistic] | None
    chunk_size: int | None
    parallel: bool | None
    local: str
    seed: int | None


def read_prediction(value: Any) -> Prediction:
    """Read what the argument ``prediction`` says: a ``Prediction``, or a mapping of its fields.

    Raises:
        TypeError: For anything else, and for keys that are no fields.

    Example:
        >>> read_prediction({"num_samples": 10}).num_samples
        10
    """
    if value is None:
        return Prediction()
    if isinstance(value, Prediction):
        return value
    known = [field.name for field in fields(Prediction)]
    if not isinstance(value, Mapping):
        raise TypeError(
            f"prediction must be a Prediction, or a dict of its fields ({', '.join(known)}), got "
            f"{shortly(value)}"
        )
    odd = [key for key in value if key not in known]
    if odd:
        raise TypeError(f"prediction has no field {odd[0]!r}; it has {', '.join(known)}")
    return Prediction(**value)


def summarised(draws: torch.Tensor, summary: Sequence[str | float]) -> torch.Tensor:
    """Reduce the first dimension of draws to means, sds and quantiles.

    Quantiles are interpolated linearly between draws, as ``numpy.quantile`` does by default.

    Args:
        draws: ``(S, ...)``; integers are taken as floating-point numbers.
        summary: ``"mean"``, ``"sd"`` (over S - 1), and numbers in [0, 1].

    Returns:
        ``(len(summary), ...)``.

    Example:
        >>> summarised(torch.tensor([1, 2, 3]), ["mean", "sd", 0.75])
        tensor([2.0000, 1.0000, 2.5000])
    """
    if not (draws.is_floating_point() or draws.is_complex()):
        draws = draws.to(torch.get_default_dtype())
    # torch.quantile refuses more than 2^24 numbers.
    ordered = draws.sort(0).values if any(not isinstance(s, str) for s in summary) else draws
    found = []
    for each in summary:
        if each == MEAN:
            found.append(draws.mean(0))
        elif each == SD:
            found.append(draws.std(0))
        else:
            at = float(each) * (len(draws) - 1)
            below = int(at)
            above = min(below + 1, len(draws) - 1)
            found.append(torch.lerp(ordered[below], ordered[above], at - below))
    return torch.stack(found)


def _read_summary(value: Any) -> tuple[str | float, ...] | None:
    if value is None:
        return None
    one = isinstance(value, str) or not isinstance(value, Sequence)
    listed = [value] if one else list(value)
    found: list[str | float] = []
    for each in listed:
        if isinstance(each, str):
            found.append(read_choice(each, "summary", (MEAN, SD)))
            continue
        level = read_number(each, "a quantile in summary")
        if level > 1:
            raise ValueError(f"a quantile in summary must lie in [0, 1], got {level}")
        found.append(level)
    if not found:
        raise ValueError("summary is empty: leave it out for the draws themselves")
    return tuple(found)
