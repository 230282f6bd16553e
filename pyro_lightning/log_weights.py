"""Importance weights of a guide's draws, streamed by batch."""

from collections.abc import Iterable
from contextlib import closing
from typing import Any, NamedTuple

import torch

from pyro_lightning.guides import refuse_point, refuse_unmade
from pyro_lightning.log_joint import LogJoint, refuse_local, terms_of
from pyro_lightning.masked_latents import KEPT
from pyro_lightning.posterior import is_latent, stands_in
from pyro_lightning.reruns import runs_without_data


class LogWeights(NamedTuple):
    r"""Draws of a guide with their importance weights.

    Attributes:
        draws: Global latents by site, ``(S, *shape of the site)``.
        log_weights: :math:`\log p(x, \theta_s) - \log q(\theta_s)` in nats, ``(S,)``, a sum over N
            observations in double precision on the CPU.
        standard_error: Of what tells the weights apart, in nats: root mean square over the draws;
            0 where all rows were seen at each draw.
        rows: At how many rows each draw was evaluated.
    """

    draws: dict[str, torch.Tensor]
    log_weights: torch.Tensor
    standard_error: float
    rows: int


def compute_log_weights(
    module: Any, batches: Iterable[Any], num_samples: int, max_rows: int | None = None
) -> LogWeights:
    r"""Draw from the guide, and compute the importance weight of each draw.

    .. math:: \log w_s = \log p(\theta_s) + \sum_{i=1}^{N} \log p(x_i \mid \theta_s)
        - \log q(\theta_s)

    The data are read once, a batch at a time. With ``max_rows`` every row is seen at the mean
    :math:`\bar\theta` of the draws alone, with its gradient, and n rows at each draw:

    .. math:: \sum_{i=1}^{N} \ell_i(\theta_s) \approx \sum_{i=1}^{N} q_i(\theta_s) +
        \frac{N}{n} \sum_{i \in u} \big[\ell_i(\theta_s) - q_i(\theta_s)\big], \quad
        q_i(\theta) = \ell_i(\bar\theta) + (\theta - \bar\theta)^\top \nabla \ell_i(\bar\theta)

    where u are whole batches, chosen at random, four at least. This is without bias; near a
    posterior of D latents its standard error is of order D / sqrt(n) nats.

    Args:
        module: A ``PyroSVIModule`` that has trained.
        batches: All N rows of the training set, once each, on the module's device.
        num_samples: S.
        max_rows: About n; None for all rows at each draw.

    Raises:
        ValueError: For a model with latents of rows or latents that the guide does not draw, for
            other rows than N, and where weights are NaN.

    Source: Quiroz, Kohn, Villani and Tran 2019, "Speeding up MCMC by efficient data subsampling",
    JASA 114, for the difference estimator.
    """
    _refuse_unserved(module)
    with torch.no_grad():
        draws, log_q = _draw_with_density(module, num_samples)
        masked = [name for name in draws if module._masks.get(name, KEPT) != KEPT]
        if masked:
            raise ValueError(
                f"the latents {', '.join(map(repr, masked))} have a mask, which the guide's draws "
                "do not know before the model runs: their weights are not computed"
            )
        model = LogJoint(module, draws)
        estimate = (
            model.all_rows(batches) if max_rows is None else model.some_rows(batches, max_rows)
        )
    weights = estimate.log_joint - log_q
    if torch.isnan(weights).any():
        raise ValueError(
            "the log-density of model or guide is NaN at a draw of the guide, so that it has no "
            "weight: svi.site_table(batch) lists every site with its log-probability"
        )
    return LogWeights(draws, weights, estimate.standard_error, estimate.rows)


def _refuse_unserved(module: Any) -> None:
    refuse_unmade(module)
    refuse_point(module.guide)
    if module._columns:
        raise ValueError(
            "importance weights of a model whose data plates cross (data_plate states sizes of "
            f"{', '.join(map(repr, module._data_plates))}) are not computed: its latents of rows "
            "and columns are as many as the data are long"
        )
    if not module._data_plates and not module._scale_sites:
        raise ValueError(
            "importance weights need to know which terms of the model belong to rows: name the "
            "plate over them by data_plate, or the observed sites by scale_sites"
        )
    if module._globals_of_data:
        raise ValueError(
            f"the guide computes global latents ({', '.join(module._globals_of_data)}) from its "
            "batch, so that it is no one distribution whose draws could be weighted"
        )


def _draw_with_density(
    module: Any, num_samples: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Draw global latents; returns them with the log-density of each draw."""
    plates = module._row_plates()
    drawn: list[dict[str, torch.Tensor]] = []
    log_q = torch.empty(num_samples, dtype=torch.double)
    # Closed as this function is left, by an error too, since it lends the parameters.
    with closing(runs_without_data(module, module.guide, num_samples)) as runs:
        for number, sites in enumerate(runs):
            local = sorted(s["name"] for s in sites if stands_in(s, plates) and is_latent(s))
            if local:
                refuse_local(local)
            log_q[number] = sum(float(terms_of(site).sum()) for site in sites)
            drawn.append({s["name"]: s["value"].detach() for s in sites if is_latent(s)})
    draws = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
    if all(bool((draw == draw[0]).all()) for draw in draws.values()):
        raise ValueError(
            "every draw of the guide is the same point, and a point has no weights: "
            f"{', '.join(map(repr, draws))}. Take a guide with a width, such as AutoNormal"
        )
    return draws, log_q
