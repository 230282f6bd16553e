"""Parameters of each row: read, and their gradients kept, for the rows of a batch alone."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuide, AutoGuideList, AutoNormal
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import transform_to

from pyro_lightning.gather import gather_rows, missing_rows
from pyro_lightning.handlers import is_subsample
from pyro_lightning.initial_rows import initial_rows
from pyro_lightning.row_sites import check_columns, check_row_site

SERVED = (AutoNormal, AutoDelta)


class RowTable(NamedTuple):
    """A parameter with one entry for each row.

    Attributes:
        part: The autoguide.
        site: Name of the latent site.
        plate: Name of its data plate.
        owner: The PyroModule that holds the parameter.
        name: The parameter's name there.
        dim: The dimension of the rows, from the left.
    """

    part: AutoGuide
    site: str
    plate: str
    owner: Any
    name: str
    dim: int

    @property
    def holder(self) -> str:
        """What has the parameter, for an error."""
        return f"{type(self.part).__name__} has parameters for each row (site '{self.site}'"

    @property
    def parameter(self) -> nn.Parameter:
        """The unconstrained parameter, all rows of it."""
        # Pyro keeps a PyroParam under this name; without a constraint, by its own.
        held = self.owner._parameters
        found: nn.Parameter = held.get(f"{self.name}_unconstrained", held.get(self.name))
        return found


def row_tables(parts: Collection[Any], plates: Collection[str]) -> list[RowTable]:
    """List the parameters of autoguides that have one entry for each row of a data plate."""
    found = []
    for part in parts:
        if not isinstance(part, SERVED) or part.prototype_trace is None:
            continue
        for name, site in part.prototype_trace.iter_stochastic_nodes():
            frames = [frame for frame in site["cond_indep_stack"] if frame.name in plates]
            if not frames:
                continue
            holders = (part.locs, part.scales) if isinstance(part, AutoNormal) else (part,)
            path, _, leaf = name.rpartition(".")
            for holder in holders:
                owner = attrgetter(path)(holder) if path else holder
                # Batch dimensions are the same before and after a constraint's transform.
                batch_dims = site["value"].dim() - site["fn"].event_dim
                dim = batch_dims + frames[0].dim
                found.append(RowTable(part, name, frames[0].name, owner, leaf, dim))
    return found


class FullSizeMessenger(Messenger):
    """Tells an autoguide that reads its prototype how many rows a data plate has in all.

    ``AutoNormal`` and ``AutoDelta`` repeat initial values to the ``full_size`` of a plate's frame,
    which for ``pyro.plate("data", len(x))`` would be one batch.
    """

    def __init__(
        self, part: Any, plates: Collection[str], identities: int, columns: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.part = part
        self.plates = plates
        self.identities = identities
        self.columns = columns
        self.initial: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(self.part, SERVED) and not is_subsample(msg):
            full = initial_rows(msg, self.plates, self.identities)
            if full is not None:
                self.initial[msg["name"]] = full
        msg["cond_indep_stack"] = tuple(
            frame._replace(full_size=self.identities) if frame.name in self.plates else frame
            for frame in msg["cond_indep_stack"]
        )

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or is_subsample(msg) or isinstance(self.part, AutoGuideList):
            return
        check_columns(msg, self.columns)
        if isinstance(self.part, SERVED):
            check_row_site(msg, self.plates)


class _GivenRowsMessenger(Messenger):
    """Keeps the rows that plates were given as they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and msg["value"] is not None:
            self.rows[msg["name"]] = torch.as_tensor(msg["value"])


@contextmanager
def rows_of_batch(
    parts: Collection[Any],
    plates: Collection[str],
    batch_size: int,
    rows: torch.Tensor | None,
    chosen: bool = False,
) -> Iterator[None]:
    """Let autoguides make their data plates for a batch, and read their tables at its rows.

    A guide would keep the plates of its prototype, of another size and with other rows. Its
    ``create_plates`` is where it asks for them at each run; it is the user's again afterwards.

    Args:
        parts: The autoguides.
        plates: Names of the data plates.
        batch_size: B.
        rows: Row numbers of the batch, ``(B,)``; None where the user's own ``create_plates`` says.
        chosen: Whether they are no batch's, so that ``create_plates`` cannot know them.

    Raises:
        ValueError: When rows are needed and missing, or when the user's plate has others.
    """
    tables = row_tables(parts, plates)

    def plates_of(part: Any, own: Any, *args: Any, **kwargs: Any) -> list[Any]:
        if chosen and own is not None:
            own = poutine.block(own, hide=list(plates))
        made, given = _given_plates(own, args, kwargs)
        if chosen:
            made = {name: plate for name, plate in made.items() if name not in plates}
        for name, frame in part._prototype_frames.items():
            if name in plates and name not in made:
                # Hidden: a hand-written part beside makes a plate of that name, too.
                with poutine.block():
                    made[name] = pyro.plate(name, batch_size, dim=frame.dim)
        for table in tables:
            if table.part is part or (table.part.master and table.part.master() is part):
                _bind(table, _agreed(table, given.get(table.plate), rows))
        return list(made.values())

    with ExitStack() as undo:
        for table in tables:
            undo.callback(table.owner.__dict__.pop, table.name, None)
        undo.enter_context(_creating_plates(parts, plates_of))
        yield


@contextmanager
def plates_of_prototype(
    parts: Collection[Any], plates: Collection[str], batch_size: int, identities: int
) -> Iterator[None]:
    """Let autoguides run once on plates of all rows, as Pyro does, to make their tables."""
    rows = torch.arange(batch_size) % identities

    def plates_of(part: Any, own: Any, *args: Any, **kwargs: Any) -> list[Any]:
        made, _ = _given_plates(own, args, kwargs)
        for name, frame in part._prototype_frames.items():
            if name in plates and name not in made:
                with poutine.block():
                    made[name] = pyro.plate(name, identities, dim=frame.dim, subsample=rows)
        return list(made.values())

    with _creating_plates(parts, plates_of):
        yield
    for part in parts:
        for name, frame in part._prototype_frames.items():
            if name in plates:  # outside our handlers a guide runs on all rows, not on any B
                whole = frame._replace(size=identities, full_size=identities)
                part._prototype_frames[name] = whole


@contextmanager
def _creating_plates(parts: Collection[Any], plates_of: Callable[..., Any]) -> Iterator[None]:
    # Only an autoguide that is in no list makes plates.
    masters = [part for part in parts if part.master is None]
    own = [part.create_plates for part in masters]
    for part in masters:
        part.create_plates = partial(plates_of, part, part.create_plates)
    try:
        yield
    finally:
        for part, create_plates in zip(masters, own, strict=True):
            part.create_plates = create_plates


def _given_plates(own: Any, args: Any, kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the user's plates; returns them, and the rows that they were given, by name."""
    if own is None:
        return {}, {}
    with _GivenRowsMessenger() as given:
        made = own(*args, **kwargs)
    return {p.name: p for p in ([made] if isinstance(made, pyro.plate) else made)}, given.rows


def _agreed(table: RowTable, given: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
    if given is not None and rows is not None and not torch.equal(given.to(rows.device), rows):
        raise ValueError(
            f"create_plates gives plate '{table.plate}' other rows than the batch is said to hold: "
            "leave create_plates out, or hand over batches without row numbers"
        )
    found = rows if given is None else given
    if found is None:
        raise ValueError(missing_rows(table.holder, table.plate))
    return found


def _bind(table: RowTable, rows: torch.Tensor) -> None:
    """Put the batch's rows where the autoguide looks for the parameter.

    An attribute of the instance comes before ``PyroModule.__getattr__``, which would transform all
    N rows.
    """
    parameter = table.parameter
    taken = gather_rows(parameter, rows.to(parameter.device), table.dim)
    constraint, _ = table.owner._pyro_params[table.name]
    table.owner.__dict__[table.name] = transform_to(constraint)(taken)
