"""`metrics=`: the argument, and what each metric asks to be fed."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import ContinuousRankedProbabilityScore

from pyro_lightning.arguments import shortly

Given = (
    Metric
    | MetricCollection
    | Sequence[Metric]
    | Mapping[str, Metric | MetricCollection | Sequence[Metric]]
    | None
)

FROM_DRAWS = frozenset({"draws", "preds"})
OF_A_SITE = FROM_DRAWS | {"target"}
_FED = (*sorted(OF_A_SITE), "log_likelihood", "loss_per_obs", "rows")


def read_metrics(given: Given) -> dict[str | None, MetricCollection]:
    """Read the argument ``metrics``.

    Args:
        given: A metric, several, a ``MetricCollection``, a dict of names and metrics, or of sites
            and several metrics.

    Returns:
        Collections by site; None where no site is named.

    Raises:
        TypeError: For something else, or a metric whose ``update`` asks for what is not fed.

    Example:
        >>> from torchmetrics import MeanAbsoluteError
        >>> list(read_metrics({"y": [MeanAbsoluteError()]})["y"].keys())
        ['MeanAbsoluteError']
    """
    if given is None:
        return {}
    several: dict[str | None, Any] = {None: given}
    if isinstance(given, Mapping) and not isinstance(given, MetricCollection):
        several = {name: each for name, each in given.items() if not isinstance(each, Metric)}
        named = {name: each for name, each in given.items() if isinstance(each, Metric)}
        if named:
            several[None] = named
    read: dict[str | None, MetricCollection] = {}
    for site, metrics in several.items():
        try:
            # Groups would have one metric updated for several whose states happen to be equal.
            read[site] = _apart(metrics)
        except ValueError as error:
            raise TypeError(
                "metrics must be a torchmetrics Metric, several, a MetricCollection, a dict of "
                "names and metrics, or a dict of observed sites and several metrics, got "
                f"{shortly(given)}: {error}"
            ) from error
        for name, metric in read[site].items():
            _check_inputs(name, metric)
    return read


def _apart(metrics: Any) -> MetricCollection:
    if not isinstance(metrics, MetricCollection):
        return MetricCollection(metrics, compute_groups=False)
    held: dict[str, Any] = dict(metrics.items(keep_base=True, copy_state=False))
    names = {"prefix": metrics.prefix, "postfix": metrics.postfix}
    return MetricCollection(held, **names, compute_groups=False)


def inputs_of(metric: Metric) -> frozenset[str]:
    """Name what a metric is fed: what its ``update`` names, or else predictions and target.

    Example:
        >>> from pyro_lightning import LogPredictiveDensity
        >>> inputs_of(LogPredictiveDensity())
        frozenset({'log_likelihood'})
    """
    if of_ensembles(metric):
        return frozenset({"draws", "target"})
    named = inspect.signature(metric.update).parameters
    known = frozenset(_FED).intersection(named)
    open_ended = any(each.kind == each.VAR_KEYWORD for each in named.values())
    # Wrappers pass on what they get.
    return frozenset({"preds", "target"}) if open_ended and not known else known


def of_ensembles(metric: Metric) -> bool:
    """Whether a metric takes draws for predictions: torchmetrics' own CRPS."""
    return type(metric).update is ContinuousRankedProbabilityScore.update


def _check_inputs(name: str, metric: Metric) -> None:
    for each in inspect.signature(metric.update).parameters.values():
        variadic = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        if not variadic and each.default is each.empty and each.name not in _FED:
            raise TypeError(
                f"update of the metric '{name}' asks for '{each.name}'; it can be fed "
                f"{', '.join(_FED)}, by these names"
            )
