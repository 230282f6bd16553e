"""A batch made ready for runs of guide and model with many draws of the latents."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from pyro_lightning.draw_runs import (
    TRIED_DRAWS,
    GivenMessenger,
    Layout,
    ManyRuns,
    Run,
    Sites,
    event_dim_of,
    is_observation,
    is_statement_of_value,
    nesting_of,
    sites_of_run,
    value_of,
)
from pyro_lightning.guides import parts_of
from pyro_lightning.layout import contents_of, layout_of
from pyro_lightning.posterior import stands_in
from pyro_lightning.retold import is_foreign, retell
from pyro_lightning.rows import IndexedBatch, checked_rows, data_of
from pyro_lightning.states import preserved_buffers

Draws = Mapping[str, torch.Tensor]

_AT_ONCE = 2**18  # draws times rows that are run together: more of them are no faster


class OfRows(NamedTuple):
    """How what is read of a site of rows is laid out.

    Attributes:
        layout: In the run of one draw.
        dim: The dimension of the rows there, from the left.
    """

    layout: Layout
    dim: int


class Ready(NamedTuple):
    """A batch whose guide and model can be run.

    Attributes:
        rows: B.
        num_samples: S.
        plates: Names of the plates over rows.
        unplated: Names of sites outside them that are of rows, too; None for all observed ones.
        latents: Names of the latents of the guide.
        posterior: Draws of the global latents.
        local: Layouts of the latents that the guide draws for this batch.
        guide: Runs the guide; None where it draws nothing more.
        model: Runs the model.
        sites: The sites of one run of the model.
    """

    rows: int
    num_samples: int
    plates: frozenset[str]
    unplated: frozenset[str] | None
    latents: frozenset[str]
    posterior: Draws
    local: Mapping[str, Layout]
    guide: ManyRuns | None
    model: ManyRuns
    sites: Sites

    def is_of_rows(self, site: Any) -> bool:
        """Whether a site has a value of each row."""
        if stands_in(site, self.plates):
            return True
        if self.unplated is None:
            return site["name"] not in self.latents and not is_statement_of_value(site)
        return site["name"] in self.unplated

    def of_rows(self, site: Any, reader: Callable[[Any], torch.Tensor]) -> OfRows:
        """Find the rows in what is read of a site.

        Raises:
            ValueError: Where they have no dimension.
        """
        tensor, name = reader(site), site["name"]
        event_dim = event_dim_of(site) if reader is value_of else 0
        frames = [frame for frame in site["cond_indep_stack"] if frame.name in self.plates]
        if not frames:
            found = [at for at, size in enumerate(tensor.shape) if size == self.rows]
            if len(found) != 1:
                raise ValueError(
                    f"site '{name}' stands in no data plate, and of its shape "
                    f"{tuple(tensor.shape)} it cannot be told which dimension is that of the "
                    f"B = {self.rows} rows: let it stand in pyro.plate('data', len(x))"
                )
            return OfRows(Layout(tensor, event_dim), found[0])
        dim = frames[0].dim
        if dim is None:
            raise ValueError(
                f"site '{name}' stands in the sequential plate '{frames[0].name}' (`for ... in "
                f"pyro.plate(...)`), where each row is a site of its own: write `with "
                f"pyro.plate('{frames[0].name}', ...):`"
            )
        # A value that all rows share has no dimension of theirs.
        missing = max(0, event_dim - dim - tensor.dim())
        shape = [1] * missing + list(tensor.shape)
        at = len(shape) - event_dim + dim
        shape[at] = self.rows
        return OfRows(Layout(tensor.expand(shape), event_dim), at)

    def read(
        self,
        reader: Callable[[Any], torch.Tensor],
        wanted: Mapping[str, OfRows],
        chunk_size: int | None,
        parallel: bool | None,
    ) -> dict[str, torch.Tensor]:
        """Read something of sites of rows, for all draws.

        Args:
            reader: Reads the message of a site.
            wanted: How that is laid out, by site.
            chunk_size: How many draws are run together; None for as many as are fast.
            parallel: Whether these are one run; None where that gives the same.

        Returns:
            ``(S, B, ...)`` by site.
        """
        chunk = max(1, _AT_ONCE // self.rows) if chunk_size is None else chunk_size
        at_once = self._at_once(parallel, min(chunk, self.num_samples))
        layouts = {name: place.layout for name, place in wanted.items()}
        result: dict[str, torch.Tensor] = {}
        for start in range(0, self.num_samples, chunk):
            draws = {name: each[start : start + chunk] for name, each in self.posterior.items()}
            count = min(chunk, self.num_samples - start)
            if self.guide is not None:
                local = self.guide.read(value_of, self.local, draws, count, at_once)
                draws = {**draws, **local}
            found = self.model.read(reader, layouts, draws, count, at_once)
            for name, each in found.items():
                each = each.movedim(1 + wanted[name].dim, 1)
                if name not in result:
                    result[name] = each.new_empty((self.num_samples, *each.shape[1:]))
                result[name][start : start + count] = each
        return result

    def _at_once(self, parallel: bool | None, chunk: int) -> bool:
        if parallel is False or (parallel is None and chunk == 1):
            return False
        why = self.why_not_at_once()
        if why is not None and parallel:
            raise ValueError(
                f"parallel=True, but model and guide cannot be run for several draws at once: "
                f"{why}. In an outer plate latents have dimensions more on the left, so that x @ w "
                "must be (x * w).sum(-1), and w[0] must be w[..., 0]. Or leave parallel out: each "
                "draw is then a run."
            )
        return why is None

    def why_not_at_once(self) -> str | None:
        """Say why one run of guide and model does not serve several draws; None where it does."""
        few = torch.arange(TRIED_DRAWS) % self.num_samples
        draws = {name: each[few.to(each.device)] for name, each in self.posterior.items()}
        if self.guide is not None:
            why = self.guide.why_not_at_once(draws)
            if why is not None:
                return f"guide, {why}"
            local = self.guide.read(value_of, self.local, draws, TRIED_DRAWS, False)
            draws = {**draws, **local}
        return self.model.why_not_at_once(draws)


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
        ValueError: When it is not known how many draws there are, or for global latents that have
            none.
    """
    own = local_sites(module) if local == "guide" else set()
    posterior = {n: d.detach() for n, d in posterior.items() if n not in local_sites(module)}
    count = _count_draws(posterior, num_samples)
    batch, seen = _with_rows_that_trained(module, batch)
    data = data_of(batch)
    rows = module.num_rows(data)
    args, kwargs = module.model_inputs(data)
    handler = module._handler(rows)
    plates = frozenset({*module._cut_plates, *module._row_plates()}.difference(module._columns))
    first = {name: draws[0] for name, draws in posterior.items()}
    with (
        torch.no_grad(),
        preserved_buffers(module),
        module._isolated() as handled,
        module._rows_of(batch, rows, held_out=True) as unseen,
    ):

        def bare(part: Any) -> Run:
            # A handler anew for each run: it keeps the sites that it meets.
            return lambda: handler()(handled(part))(*args, **kwargs)

        own = own.difference(unseen)
        in_guide: Sites = {}
        if own:
            with _told("guide", module, data):
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
        with _told("model", module, data):
            in_model = sites_of_run(bare(module.model), given(values))
        nesting = nesting_of(in_guide, in_model)
        event_dims = {name: _event_dim(site) for name, site in {**in_guide, **in_model}.items()}
        event_dims = {**dict.fromkeys(posterior, 0), **event_dims}
        ready = Ready(
            rows=rows,
            num_samples=count,
            plates=plates,
            unplated=frozenset(module._scale_sites) if plates or module._scale_sites else None,
            latents=frozenset({*module._sites, *local_sites(module), *posterior}),
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
    return seen.reshape(-1, *(1,) * (-dim - 1 + site["fn"].event_dim))


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


@contextmanager
def _told(part: str, module: Any, data: Any) -> Iterator[None]:
    """Say of an error what the batch holds, and what may be missing in it."""
    try:
        yield
    except Exception as error:
        if not is_foreign(error):
            raise
        hint = ""
        if layout_of(data) != layout_of(module._prototype):
            hint = (
                f" Those of the fit held {contents_of(module._prototype)}. What is observed may be "
                "left out where model and guide have a default for it, as in def model(x, y=None), "
                "and take the size of their plates from what is left."
            )
            if part == "guide":
                hint += (
                    " A guide that reads what is observed does not serve new rows: local='prior' "
                    "draws their latents from the prior, given the globals."
                )
        retell(
            error, f"the {part} fails on this batch", f" The batch holds {contents_of(data)}.{hint}"
        )
