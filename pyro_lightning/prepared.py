"""A batch made ready for runs of guide and model with many draws of the latents."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from pyro_lightning.batch_runs import Draws, Ready
from pyro_lightning.draw_runs import Layout, ManyRuns, nesting_of
from pyro_lightning.given_runs import (
    GivenMessenger,
    Run,
    Sites,
    is_observation,
    is_statement_of_value,
    sites_of_run,
    value_of,
)
from pyro_lightning.guides import parts_of, refuse_unmade
from pyro_lightning.layout import contents_of, layout_of, telling_contents
from pyro_lightning.posterior import stands_in
from pyro_lightning.rows import IndexedBatch, checked_rows, data_of
from pyro_lightning.states import evaluating


@contextmanager
def prepared(
    module: Any,
    batch: Any,
    posterior: Draws,
    num_samples: int | None,
    local: str,
    unobserved: bool,
) -> Iterator[Ready]:
    """Make a batch ready, and leave parameters, buffers and gradients as they are.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters.
        batch: B rows, on its device.
        posterior: Draws of the global latents.
        num_samples: S, where there are none.
        local: Where latents of rows come from: ``"guide"`` or ``"prior"``.
        unobserved: Whether observed sites are drawn.

    Raises:
        RuntimeError: Before the first fit or loss, when the guide has no parameters yet.
        ValueError: When it is not known how many draws there are, or for global latents that have
            none.
    """
    refuse_unmade(module)
    known = local_sites(module)
    own = known if local == "guide" else set()
    posterior = {n: d.detach() for n, d in posterior.items() if n not in known}
    count = _count_draws(posterior, num_samples)
    batch, seen = _with_rows_that_trained(module, batch)
    data = data_of(batch)
    rows = module.num_rows(data)
    args, kwargs = module.model_inputs(data)
    handler = module._handler(rows)
    plates = frozenset({*module._cut_plates, *module._row_plates()}.difference(module._columns))
    first = {name: draws[0] for name, draws in posterior.items()}
    hint = partial(_hint, module, data)
    with (
        torch.no_grad(),
        evaluating(module),
        module._isolated() as handled,
        module._rows_of(batch, rows, held_out=True) as unseen,
    ):

        def bare(part: Any) -> Run:
            # A handler anew for each run: it keeps the sites that it meets.
            return lambda: handler()(handled(part))(*args, **kwargs)

        own = own.difference(unseen)
        in_guide: Sites = {}
        if own:
            with telling_contents(data, "the guide", partial(hint, of_guide=True)):
                in_guide = sites_of_run(bare(module.guide), GivenMessenger(first))
        layouts = {
            name: Layout(value_of(in_guide[name]), _event_dim(in_guide[name])) for name in own
        }
        masks = {
            name: _mask_of_rows(in_guide[name], seen, plates)
            for name in own.intersection(_sites_of_known_rows(module))
            if seen is not None
        }
        given = partial(GivenMessenger, mixed=masks, unobserved=unobserved)
        values = {**first, **{name: value_of(in_guide[name]) for name in own}}
        with telling_contents(data, "the model", hint):
            in_model = sites_of_run(bare(module.model), given(values))
        nesting = nesting_of(in_guide, in_model)
        # Model and guide agree about them, or Pyro refuses the two.
        event_dims = {name: _event_dim(site) for name, site in {**in_guide, **in_model}.items()}
        event_dims = {**dict.fromkeys(posterior, 0), **event_dims}
        ready = Ready(
            rows=rows,
            num_samples=count,
            plates=plates,
            unplated=frozenset(module._scale_sites) if plates or module._scale_sites else None,
            latents=frozenset({*module._sites, *known, *posterior}),
            posterior=posterior,
            local=layouts,
            guide=ManyRuns(bare(module.guide), GivenMessenger, event_dims, nesting)
            if own
            else None,
            model=ManyRuns(bare(module.model), given, event_dims, nesting),
            sites=in_model,
        )
        _check_globals(ready, module, values)
        yield ready


def rows_from_prior(module: Any, batch: Any) -> tuple[list[str], int]:
    """Tell which latents of how many rows of a batch come from the prior: the guide has none.

    Args:
        module: A ``PyroSVIModule`` whose guide has parameters.
        batch: A batch of it.
    """
    sites = sorted(_sites_of_known_rows(module))
    if not sites or any(part.create_plates is not None for part in parts_of(module.guide)):
        return sites, 0
    rows = module.num_rows(data_of(batch))
    if not isinstance(batch, IndexedBatch):
        return sites, rows
    if module._trained is None:
        return sites, 0
    return sites, int((~module._trained[torch.as_tensor(batch.rows).cpu()]).sum())


def local_sites(module: Any) -> set[str]:
    """Name the latents of which a batch has its own."""
    return {*(table.site for table in module._tables()), *module._sites_of_data}


def _sites_of_known_rows(module: Any) -> set[str]:
    """Name the latents of rows of which a guide knows nothing where it did not train on them."""
    by_hand = module._sites_of_data if module._pyro_param_store.row_params() else ()
    return {*(table.site for table in module._tables()), *by_hand}


def _count_draws(posterior: Draws, num_samples: int | None) -> int:
    counts = {name: len(draws) for name, draws in posterior.items()}
    if num_samples is not None:
        counts["num_samples"] = num_samples
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
        raise ValueError(
            "expected one number of draws, from posterior_samples(num_samples) or by num_samples "
            f"where there are no global latents; got {told}"
        )
    return next(iter(counts.values()))


def _with_rows_that_trained(module: Any, batch: Any) -> tuple[Any, torch.Tensor | None]:
    """Put rows that trained in the place of those that did not, where a batch has both.

    Returns the batch, and which of its rows trained; None where all did, or none.
    """
    trained = module._trained
    if not isinstance(batch, IndexedBatch) or trained is None or not module._per_row():
        return batch, None
    count = module.num_rows(data_of(batch))
    rows = checked_rows(batch, count, module._count_rows(), module._source)
    assert rows is not None  # it is an IndexedBatch
    seen = trained[rows.cpu()].to(rows.device)
    if seen.all() or not seen.any():
        return batch, None
    return batch._replace(rows=torch.where(seen, rows, rows[seen][0])), seen


def _mask_of_rows(site: Any, seen: torch.Tensor, plates: frozenset[str]) -> torch.Tensor:
    """Shape a mask of rows as the value of a site is."""
    dim = next(f.dim for f in site["cond_indep_stack"] if f.name in plates)
    return seen.to(site["value"].device).reshape(-1, *(1,) * (-dim - 1 + site["fn"].event_dim))


def _event_dim(site: Any) -> int:
    event_dim: int = site["fn"].event_dim
    return event_dim


def _check_globals(ready: Ready, module: Any, values: Mapping[str, Any]) -> None:
    """Refuse latents outside the data plate that would be others in each batch."""
    for name, site in ready.sites.items():
        if name in values or is_observation(site) or is_statement_of_value(site):
            continue
        if not ready.is_of_rows(site) and not stands_in(site, module._cut_plates):
            summed = " The ELBO sums it out." if site["infer"].get("enumerate") else ""
            raise ValueError(
                f"global latent '{name}' has no draws: the guide does not draw it, and each batch "
                f"would have another.{summed} Give draws of it, of shape (num_samples, "
                f"{', '.join(map(str, site['value'].shape))}), beside those of posterior_samples."
            )


def _hint(module: Any, data: Any, of_guide: bool = False) -> str:
    """Say what may be missing in a batch, where its layout is none of the fit's."""
    if layout_of(data) == layout_of(module._prototype):
        return ""
    hint = (
        f" Those of the fit held {contents_of(module._prototype)}. What is observed may be left "
        "out where model and guide have a default for it, as in def model(x, y=None), and take "
        "the size of their plates from what is left."
    )
    if of_guide:
        hint += (
            " A guide that reads what is observed does not serve new rows: local='prior' draws "
            "their latents from the prior, given the globals."
        )
    return hint
