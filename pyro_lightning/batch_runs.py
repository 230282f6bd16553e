"""How guide and model of a batch are run for many draws, and where its rows stand in a site."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pyro_lightning.arguments import read_count
from pyro_lightning.draw_runs import Layout, ManyRuns, number_to_try
from pyro_lightning.given_runs import Sites, event_dim_of, is_statement_of_value, value_of
from pyro_lightning.posterior import stands_in

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


@dataclass
class HowToRun:
    """How draws are run, which the first of several batches tells the others.

    Attributes:
        chunk_size: How many are run together; None for as many as are fast.
        parallel: Whether these are one run; None where that gives the same.
        tried: Whether this is known, so that it is not tried.
    """

    chunk_size: int | None = None
    parallel: bool | None = None
    tried: bool = False

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            self.chunk_size = read_count(self.chunk_size, "chunk_size")

    def find_out(self, vectorise: Callable[[], bool]) -> None:
        """Take note of whether draws vectorise, on a first batch, unless it is known."""
        if self.parallel is None:
            self.parallel, self.tried = vectorise(), True


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
        self, reader: Callable[[Any], torch.Tensor], wanted: Mapping[str, OfRows], how: HowToRun
    ) -> dict[str, torch.Tensor]:
        """Read something of sites of rows, for all draws.

        Args:
            reader: Reads the message of a site.
            wanted: How that is laid out, by site.
            how: How draws are run.

        Returns:
            ``(S, B, ...)`` by site.
        """
        layouts = {name: place.layout for name, place in wanted.items()}

        def rows_first(draws: Draws, count: int, at_once: bool) -> dict[str, torch.Tensor]:
            found = self.model.read(reader, layouts, draws, count, at_once)
            return {name: each.movedim(1 + wanted[name].dim, 1) for name, each in found.items()}

        return self.in_chunks(rows_first, how)

    def in_chunks(
        self, run: Callable[[Draws, int, bool], dict[str, torch.Tensor]], how: HowToRun
    ) -> dict[str, torch.Tensor]:
        """Run the model for all draws, a chunk at a time.

        Args:
            run: From draws of the latents, their number, and whether one run is to serve them all:
                ``(count, ...)`` by site.
            how: How draws are run.

        Returns:
            ``(S, ...)`` by site.
        """
        chunk = max(1, _AT_ONCE // self.rows) if how.chunk_size is None else how.chunk_size
        at_once = self._at_once(how, min(chunk, self.num_samples))
        result: dict[str, torch.Tensor] = {}
        for start in range(0, self.num_samples, chunk):
            draws = {name: each[start : start + chunk] for name, each in self.posterior.items()}
            count = min(chunk, self.num_samples - start)
            if self.guide is not None:
                local = self.guide.read(value_of, self.local, draws, count, at_once)
                draws = {**draws, **local}
            for name, each in run(draws, count, at_once).items():
                if name not in result:
                    result[name] = each.new_empty((self.num_samples, *each.shape[1:]))
                result[name][start : start + count] = each
        return result

    def _at_once(self, how: HowToRun, chunk: int) -> bool:
        if how.tried and how.parallel is not None:
            return how.parallel
        if how.parallel is False or (how.parallel is None and chunk == 1):
            return False
        why = self.why_not_at_once()
        if why is not None and how.parallel:
            raise ValueError(
                f"parallel=True, but model and guide cannot be run for several draws at once: "
                f"{why}. In an outer plate latents have dimensions more on the left, so that x @ w "
                "must be (x * w).sum(-1), and w[0] must be w[..., 0]. Or leave parallel out: each "
                "draw is then a run."
            )
        how.parallel, how.tried = why is None, True
        return how.parallel

    def why_not_at_once(self) -> str | None:
        """Say why one run of guide and model does not serve several draws; None where it does."""
        count = number_to_try(self.sites)
        few = torch.arange(count) % self.num_samples
        draws = {name: each[few.to(each.device)] for name, each in self.posterior.items()}
        if self.guide is not None:
            why = self.guide.why_not_at_once(draws, count)
            if why is not None:
                return f"guide, {why}"
            local = self.guide.read(value_of, self.local, draws, count, False)
            draws = {**draws, **local}
        return self.model.why_not_at_once(draws, count)
