"""Posterior predictive draws and pointwise log-likelihoods of a batch, given global latents."""

from collections.abc import Sequence
from typing import Any

import torch

from pyro_lightning.arguments import read_choice
from pyro_lightning.batch_runs import Draws, HowToRun, Ready
from pyro_lightning.given_runs import Sites, is_observation, log_prob_of, value_of
from pyro_lightning.plates import read_names
from pyro_lightning.prepared import local_sites, prepared
from pyro_lightning.summed_out import is_summed_out, summed_log_likelihood

LOCAL = ("guide", "prior")


def global_draws(module: Any, num_samples: int) -> dict[str, torch.Tensor]:
    """Draw the global latents, which all batches share.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters.
        num_samples: S.

    Returns:
        ``(S, *shape of the site)`` by site; nothing where every latent is one of rows.

    Raises:
        ValueError: When the guide computes global latents from its batch.
    """
    local = local_sites(module)
    if module._initialised and local.issuperset(module._sites):
        return {}
    draws = module.posterior_samples(num_samples)
    return {name: value for name, value in draws.items() if name not in local}


def predictive_draws(
    module: Any,
    batch: Any,
    posterior: Draws,
    num_samples: int | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    chunk_size: int | None = None,
    parallel: bool | None = None,
    how: HowToRun | None = None,
    local: str = "guide",
) -> dict[str, torch.Tensor]:
    r"""Draw sites in the data plate from the posterior predictive distribution of a batch.

    .. math:: y_i^{(s)} \sim p(y_i \mid \theta^{(s)}, z_i^{(s)}), \quad
        z_i^{(s)} \sim q(z_i \mid \theta^{(s)}, x_i)

    Draw s of every batch that is given the same ``posterior`` has the same global latents, so that
    sums over the rows of several batches are draws, too. A latent of a row that never trained, or
    that nothing guides, comes from the prior given the globals, :math:`p(z_i \mid \theta^{(s)})`.
    Observed sites are drawn whether the batch has their values or not.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters.
        batch: B rows, on its device.
        posterior: S draws of the global latents, as :func:`global_draws` returns them.
        num_samples: S, needed where there are no global latents.
        sites: Which sites in the data plate; by default those that the guide does not draw:
            observed ones and ``pyro.deterministic`` statements.
        chunk_size: How many draws are run together; by default so many that with B rows each they
            are 2^18 at most.
        parallel: Whether one run of model and guide, in an outer plate, serves all draws of a
            chunk. None does so where this gives what a run for each draw does, which is tried on
            three draws.
        how: These two, as batches before have told; this one tells those that follow.
        local: ``"guide"``; or ``"prior"`` for latents of rows from the prior given the globals, as
            for new rows that lack what the guide reads.

    Returns:
        ``(S, B, *other plates, *event)`` by site, on the device of the module.

    Raises:
        ValueError: For sites that are not in the data plate, or that run in a sequential one; for
            global latents that ``posterior`` lacks; under ``parallel=True`` for a model that cannot
            be run for several draws at once.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_lightning import PyroSVIModule
        >>> def model(x, y=None):
        ...     w = pyro.sample("w", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(w * x, 1.), obs=y)
        >>> svi = PyroSVIModule(model, dataset_size=100)
        >>> _ = svi.loss((torch.ones(20), torch.zeros(20)))
        >>> predictive_draws(svi, (torch.ones(8),), svi.posterior_samples(50))["y"].shape
        torch.Size([50, 8])

    Source: ``pyro.infer.Predictive``.
    """
    how, local = how or HowToRun(chunk_size, parallel), _read_local(local)
    with prepared(module, batch, posterior, num_samples, local, unobserved=True) as ready:
        names = _sites_to_draw(ready, read_names(sites, "sites"))
        wanted = {name: ready.of_rows(ready.sites[name], value_of) for name in names}
        return ready.read(value_of, wanted, how)


def log_likelihood_of(
    module: Any,
    batch: Any,
    posterior: Draws,
    num_samples: int | None = None,
    *,
    chunk_size: int | None = None,
    parallel: bool | None = None,
    how: HowToRun | None = None,
    local: str = "guide",
) -> dict[str, torch.Tensor]:
    r"""Compute the log-likelihood of each row of a batch, for draws of the latents.

    .. math:: \log p(y_i \mid \theta^{(s)}, z_i^{(s)})

    in nats, summed over the dimensions of an event and nothing else, without N/B and without scales
    of the model's own: a row counts once. What a mask leaves out is 0. Latents are drawn as in
    :func:`predictive_draws`.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters.
        batch: B rows with what was observed, on its device.
        posterior: S draws of the global latents.
        num_samples: S, needed where there are none.
        chunk_size: As in :func:`predictive_draws`.
        parallel: As in :func:`predictive_draws`.
        how: As in :func:`predictive_draws`.
        local: As in :func:`predictive_draws`.

    Returns:
        ``(S, B, *other plates)`` by observed site.

    Raises:
        ValueError: As in :func:`predictive_draws`, and when nothing is observed.

    Source: the group ``log_likelihood`` of ArviZ's schema.
    """
    how, local = how or HowToRun(chunk_size, parallel), _read_local(local)
    with prepared(module, batch, posterior, num_samples, local, unobserved=False) as ready:
        observed = observed_sites(ready)
        if is_summed_out(ready):
            return summed_log_likelihood(ready, observed, how)
        wanted = {name: ready.of_rows(site, log_prob_of) for name, site in observed.items()}
        return ready.read(log_prob_of, wanted, how)


def draws_vectorise(
    module: Any,
    batch: Any,
    posterior: Draws,
    num_samples: int | None = None,
    *,
    local: str = "guide",
) -> bool:
    """Whether one run of guide and model, in an outer plate, serves several draws of a batch.

    It is tried on three draws, by runs in both ways with equal values at all sites.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters.
        batch: B rows, on its device.
        posterior: Draws of the global latents.
        num_samples: Their number, needed where there are none.
        local: As in :func:`predictive_draws`.
    """
    local = _read_local(local)
    with prepared(module, batch, posterior, num_samples, local, unobserved=True) as ready:
        return ready.why_not_at_once() is None


def _read_local(local: str) -> str:
    choice: str = read_choice(local, "local", LOCAL)
    return choice


def _sites_to_draw(ready: Ready, asked: tuple[str, ...]) -> list[str]:
    of_rows = [name for name, site in ready.sites.items() if ready.is_of_rows(site)]
    for name in asked:
        if name not in of_rows:
            known = ", ".join(map(repr, of_rows)) or "none"
            what = "stands outside" if name in ready.sites else "is no site in"
            raise ValueError(
                f"site '{name}' {what} the data plate, whose sites are {known}; global latents are "
                "those of posterior_samples(num_samples)"
            )
    if asked:
        return list(asked)
    # An autoguide draws the value of a factor, too, which is none.
    found = [name for name in of_rows if name not in ready.latents]
    found = [name for name in found if ready.sites[name]["value"].numel()]
    if not found:
        raise ValueError(
            "there is nothing to predict: the model has no site in the data plate but latents of "
            "the guide. Name them by sites."
        )
    return found


def observed_sites(ready: Ready) -> Sites:
    """Find the observed sites of rows, of which there must be one."""
    found = {
        name: site
        for name, site in ready.sites.items()
        if name not in ready.latents and is_observation(site) and ready.is_of_rows(site)
    }
    if not found:
        raise ValueError(
            "nothing is observed in this batch: hand over what the model observes in its data plate"
        )
    return found
