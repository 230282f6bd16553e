"""torchmetrics classes of predictive draws: sums over rows, which processes add up."""

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import Metric
from torchmetrics.regression import ContinuousRankedProbabilityScore

from pyro_lightning.arguments import read_count, read_tensor
from pyro_lightning.calibration import distance_from_uniform, pit_masses
from pyro_lightning.densities import density_sums, mean_with_error
from pyro_lightning.intervals import interval_sums, read_levels
from pyro_lightning.scores import pointwise_crps


class _Sums(Metric):
    """Sums over rows in float64, in which a number of rows is exact and differences stay."""

    is_differentiable = False
    full_state_update = False

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")


class LogPredictiveDensity(_Sums):
    """The expected log predictive density of an observation, ``elpd``, and its error, ``elpd_se``.

    A mean over all N rows of the updates in nats, not a sum, as in
    :func:`pyro_lightning.log_predictive_density`.

    Example:
        >>> metric = LogPredictiveDensity()
        >>> metric.update(torch.tensor([[0.2, 0.4], [0.6, 0.4]]).log())   # (S, B)
        >>> metric.update(torch.tensor([[0.4], [0.4]]).log())
        >>> metric.compute()["elpd"].exp()
        tensor(0.4000, dtype=torch.float64)
    """

    higher_is_better = True
    sums: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("sums", 3)

    def update(self, log_likelihood: torch.Tensor) -> None:
        """Add the rows of a batch.

        Args:
            log_likelihood: Of each observation under each draw, ``(S, B)``, in nats.
        """
        self.sums += density_sums(log_likelihood)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return ``elpd`` and ``elpd_se``."""
        mean, error = mean_with_error(self.sums)
        return {"elpd": mean, "elpd_se": error}


class IntervalCoverage(_Sums):
    """Coverage and width of central predictive intervals: ``coverage_0.9``, ``width_0.9``, ...

    Means over all entries of the target that are not NaN, as in
    :func:`pyro_lightning.interval_coverage`.

    Args:
        levels: Probabilities of the intervals.
        **kwargs: Of ``torchmetrics.Metric``.

    Example:
        >>> metric = IntervalCoverage(levels=0.9)
        >>> draws = torch.arange(1.0, 20.0).unsqueeze(1).expand(19, 4)    # (S, B)
        >>> metric.update(draws, torch.tensor([0.0, 1.0, 10.0, 19.0]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'coverage_0.9': 0.75, 'width_0.9': 18.0}
    """

    higher_is_better = None
    levels: torch.Tensor
    count: torch.Tensor
    covered: torch.Tensor
    width: torch.Tensor

    def __init__(self, levels: float | Sequence[float] = (0.5, 0.9), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._levels = read_levels(levels)
        # A state, too, that differs: a MetricCollection updates only one of metrics whose states
        # are equal after the first batch, which those of two levels may be by chance.
        self.add_state("levels", torch.tensor(self._levels), dist_reduce_fx="max")
        self._add_sum("count")
        self._add_sum("covered", len(self._levels))
        self._add_sum("width", len(self._levels))

    def update(self, draws: torch.Tensor, target: torch.Tensor) -> None:
        """Add the rows of a batch.

        Args:
            draws: ``(S, B, ...)``.
            target: ``(B, ...)``.
        """
        count, covered, width = interval_sums(draws, target, self._levels)
        self.count += count
        self.covered += covered
        self.width += width

    def compute(self) -> dict[str, torch.Tensor]:
        """Return coverage and width of each level."""
        sums = {"coverage": self.covered, "width": self.width}
        return {
            f"{name}_{level:g}": total / self.count
            for name, totals in sums.items()
            for level, total in zip(self._levels, totals, strict=True)
        }


class CRPS(ContinuousRankedProbabilityScore):
    """torchmetrics' continuous ranked probability score, of draws, and in S log S operations.

    The mean over all entries of the target that are not NaN, as in :func:`pyro_lightning.crps`.
    torchmetrics' own compares all S^2 pairs of draws, which of 1,000 takes longer than all else.

    Example:
        >>> metric = CRPS()
        >>> draws = torch.tensor([[1.0, 0.0], [3.0, 0.0]])    # (S, B)
        >>> metric.update(draws, torch.tensor([2.0, 0.0]))
        >>> metric.compute()
        tensor(0.2500)
    """

    def update(self, draws: torch.Tensor, target: torch.Tensor) -> None:
        """Add the rows of a batch.

        Args:
            draws: ``(S, B, ...)``.
            target: ``(B, ...)``.
        """
        scores = pointwise_crps(draws, target)
        self.score += scores.sum()
        self.total += len(scores)


class PITHistogram(_Sums):
    """The histogram of the probability integral transform, ``pit``, and its ``pit_error``.

    Shares of all entries of the target that are not NaN, as in
    :func:`pyro_lightning.pit_histogram`, and their distance from equal ones, as in
    :func:`pyro_lightning.calibration.distance_from_uniform`.

    Args:
        bins: How many equal bins of [0, 1].
        **kwargs: Of ``torchmetrics.Metric``.

    Example:
        >>> metric = PITHistogram(bins=4)
        >>> draws = torch.tensor([1.0, 2.0, 3.0]).unsqueeze(1).expand(3, 2)    # (S, B)
        >>> metric.update(draws, torch.tensor([0.0, 1.5]))
        >>> metric.compute()["pit_error"].item()
        0.5
    """

    higher_is_better = False
    masses: torch.Tensor

    def __init__(self, bins: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bins = read_count(bins, "bins")
        self._add_sum("masses", self.bins)

    def update(self, draws: torch.Tensor, target: torch.Tensor) -> None:
        """Add the rows of a batch.

        Args:
            draws: ``(S, B, ...)``.
            target: ``(B, ...)``.
        """
        self.masses += pit_masses(draws, target, self.bins)

    def compute(self) -> dict[str, torch.Tensor]:
        """Return ``pit_error`` and ``pit``, ``(bins,)``."""
        shares = self.masses / self.masses.sum()
        return {"pit_error": distance_from_uniform(shares), "pit": shares}

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the histogram as densities, beside the 1 of a calibrated prediction.

        Args:
            val: What ``compute`` or ``forward`` returned; by default ``compute`` is called.
            ax: Axes of matplotlib to draw on.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: Without matplotlib.
        """
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'a plot needs matplotlib: pip install "pyro-lightning[plots]"'
            ) from error
        shares = (self.compute() if val is None else val)["pit"].detach().cpu()
        figure, ax = pyplot.subplots() if ax is None else (ax.figure, ax)
        width = 1 / len(shares)
        places = torch.arange(len(shares)) * width
        ax.bar(places.numpy(), (shares / width).numpy(), width, align="edge", edgecolor="white")
        ax.axhline(1.0, color="black", linestyle="--", label="calibrated")
        ax.set(xlim=(0, 1), xlabel="probability integral transform", ylabel="density")
        ax.legend()
        return figure, ax


class NegativeELBO(_Sums):
    """The negative ELBO of an observation, in nats.

    The mean over rows of estimates from batches of them, so that rows weigh the same; fed by a
    ``PyroSVIModule`` it is ``val_loss_per_obs``. Divide a sum over N, as ``svi.loss(batch)`` is, by
    N first.

    Example:
        >>> metric = NegativeELBO()
        >>> metric.update(torch.tensor(2.0), rows=3)
        >>> metric.update(torch.tensor(6.0), rows=1)
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    higher_is_better = False
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("total")
        self._add_sum("count")

    def update(self, loss_per_obs: torch.Tensor, rows: int) -> None:
        """Add the rows of a batch.

        Args:
            loss_per_obs: The estimate of the negative ELBO from the batch, over the number of
                observations that it speaks for.
            rows: B.

        Raises:
            TypeError: For what is no number.
        """
        rows = read_count(rows, "rows", 0)
        self.total += read_tensor(loss_per_obs, "loss_per_obs").double() * rows
        self.count += rows

    def compute(self) -> torch.Tensor:
        """Return the mean."""
        return self.total / self.count
