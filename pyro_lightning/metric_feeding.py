"""What torchmetrics are fed from a batch that is evaluated, and the numbers that they give."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from pyro_lightning.arguments import shortly
from pyro_lightning.draws import paired
from pyro_lightning.metric_inputs import OF_A_SITE, inputs_of, of_ensembles

_PAIRS = 2**24  # of draws, of all rows that torchmetrics' CRPS compares at once


@dataclass
class Evaluated:
    """What is known of a batch that was evaluated.

    Attributes:
        loss_per_obs: The estimate of the negative ELBO of an observation.
        rows: B.
        target: What was observed, ``(B, ...)`` by site; NaN where a mask leaves it out.
        draws: Posterior predictive draws, ``(S, B, ...)`` by site.
        log_likelihood: ``(S, B)`` by site, in nats.
    """

    loss_per_obs: torch.Tensor
    rows: int
    target: Mapping[str, torch.Tensor] = field(default_factory=dict)
    draws: Mapping[str, torch.Tensor] = field(default_factory=dict)
    log_likelihood: Mapping[str, torch.Tensor] = field(default_factory=dict)


class SiteMetrics(nn.Module):
    """Metrics of observed sites, each fed what its ``update`` names.

    Args:
        collections: Metrics by site; None for those of the only site.

    Example:
        >>> from torchmetrics import MeanAbsoluteError
        >>> from pyro_lightning.metric_inputs import read_metrics
        >>> metrics = SiteMetrics(read_metrics({"mae": MeanAbsoluteError()}))
        >>> draws = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> metrics.update(Evaluated(torch.tensor(0.0), 2, {"y": torch.zeros(2)}, {"y": draws}))
        >>> metrics.numbers("val_")
        {'val_mae': tensor(2.)}
    """

    def __init__(self, collections: Mapping[str | None, MetricCollection]) -> None:
        super().__init__()
        self.sites = tuple(collections)
        # A list, since the name of a site may be none of a module. Copies, whose states are apart.
        self.collections = nn.ModuleList(each.clone() for each in collections.values())
        self.reset()

    def another(self) -> "SiteMetrics":
        """Return metrics of these settings that have met no batch."""
        return SiteMetrics(dict(self._items()))

    def _items(self) -> Iterator[tuple[str | None, MetricCollection]]:
        yield from zip(self.sites, self.collections, strict=True)

    @property
    def needs(self) -> frozenset[str]:
        """What the metrics are fed, of all that a batch gives."""
        return frozenset().union(
            *(inputs_of(m) for _, each in self._items() for m in each.values())
        )

    def named(self) -> dict[str, Metric]:
        """Name the metrics, those of a site by the site, too."""
        return {
            name if site is None else f"{site}_{name}": metric
            for site, each in self._items()
            for name, metric in each.items()
        }

    def reset(self) -> None:
        """Forget all batches."""
        self.batches = 0
        for _, each in self._items():
            each.reset()

    def sites_for(self, needed: Collection[str], observed: Collection[str]) -> set[str]:
        """Name the sites of which the metrics need one of these.

        Args:
            needed: Names of what is fed.
            observed: The sites that are observed.

        Raises:
            ValueError: Where it is not said which of several, or a site is not observed.
        """
        found: set[str] = set()
        for site, each in self._items():
            inputs = frozenset().union(*map(inputs_of, each.values()))
            if site is None and "log_likelihood" in inputs.intersection(needed):
                found.update(observed)
            if inputs & OF_A_SITE.union({"log_likelihood"} if site else ()):
                name = _only(site, observed)
                if inputs.intersection(needed):
                    found.add(name)
        return found

    def update(self, evaluated: Evaluated) -> None:
        """Feed a batch.

        Args:
            evaluated: What is known of it.
        """
        self.batches += 1
        for site, each in self._items():
            for metric in each.values():
                _feed(metric, site, evaluated)

    def numbers(self, prefix: str) -> dict[str, torch.Tensor]:
        """Compute the metrics; returns the numbers by name.

        Names are those of a ``MetricCollection``: the metric's, or the keys of what it returns if
        that is a dict. Entry n of a tuple or vector has the name and ``_n``.

        Args:
            prefix: What names begin with; names of a site's metrics then have the site.
        """
        found: dict[str, torch.Tensor] = {}
        for site, each in self._items():
            with warnings.catch_warnings():
                # Of a rank without rows, whose part of the sums is 0.
                warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
                results = each.compute()
            before = prefix if site is None else f"{prefix}{site}_"
            for name, result in results.items():
                found.update(_numbers(f"{before}{name}", result))
        return found


def _only(site: str | None, observed: Collection[str]) -> str:
    names = ", ".join(map(repr, observed))
    if site is None:
        if len(observed) > 1:
            raise ValueError(
                f"the model observes {names}: say of which site a metric is, as in "
                f"metrics={{{next(iter(observed))!r}: [...]}}"
            )
        return next(iter(observed))
    if site not in observed:
        raise ValueError(f"metrics of '{site}', but the model observes {names}")
    return site


def _feed(metric: Metric, site: str | None, evaluated: Evaluated) -> None:
    inputs = inputs_of(metric)
    fed: dict[str, Any] = {"loss_per_obs": evaluated.loss_per_obs, "rows": evaluated.rows}
    if "log_likelihood" in inputs:
        fed["log_likelihood"] = _log_likelihood(
            site, evaluated, of_all_rows=bool(inputs & OF_A_SITE)
        )
    if inputs & OF_A_SITE:
        name = _only(site, evaluated.target)
        fed["target"] = evaluated.target[name]
        fed["draws"] = evaluated.draws.get(name)
    if of_ensembles(metric):
        # Its ensembles are rows, and it compares all pairs of their members.
        draws, target = paired(fed["draws"], fed["target"])
        most = max(1, _PAIRS // len(draws) ** 2)
        parts = torch.split(draws.T, most), torch.split(target, most)
        for some, values in zip(*parts, strict=True):
            metric.update(some, values)
        return
    if "preds" in inputs:
        fed["preds"] = _means(fed["draws"])
        if "draws" not in inputs:
            # torchmetrics' own have no way to say what was not observed.
            seen = ~fed["target"].isnan().reshape(evaluated.rows, -1).any(1)
            fed["preds"], fed["target"] = fed["preds"][seen], fed["target"][seen]
            if not len(fed["target"]):
                return
    metric.update(**{name: fed[name] for name in inputs})


def _log_likelihood(site: str | None, evaluated: Evaluated, of_all_rows: bool) -> torch.Tensor:
    terms, targets = evaluated.log_likelihood, evaluated.target
    if site is None:
        summed = torch.stack(list(terms.values())).sum(0)
    elif site in terms:
        summed, targets = terms[site], {site: targets[site]}
    else:
        raise ValueError(
            f"'{site}' has no log-likelihood of its own: it shares a latent that the ELBO sums out "
            f"with others, and is one of {', '.join(map(repr, terms))}. Name no site for the sum"
        )
    if of_all_rows or not targets:
        return summed
    # The 0 of a row of which nothing was observed is no density.
    seen = [~each.isnan().reshape(len(each), -1).all(1) for each in targets.values()]
    return summed[:, torch.stack(seen).any(0)]


def _means(draws: torch.Tensor) -> torch.Tensor:
    return (draws if draws.is_floating_point() else draws.float()).mean(0)


def _numbers(name: str, result: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(result, Mapping):
        for key, each in result.items():
            yield from _numbers(f"{name}_{key}", each)
    elif isinstance(result, tuple | list):
        for number, each in enumerate(result):
            yield from _numbers(f"{name}_{number}", each)
    elif not isinstance(result, torch.Tensor | float | int):
        raise TypeError(f"the metric '{name}' gives {shortly(result)}, which is no number")
    elif isinstance(result, torch.Tensor) and result.numel() != 1:
        for number, each in enumerate(result.reshape(-1)):
            yield f"{name}_{number}", each
    else:
        yield name, torch.as_tensor(result).reshape(())
