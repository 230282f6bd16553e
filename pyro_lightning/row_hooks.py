"""Lightning's side of parameters of each row: which rows there are, and their gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from pyro_lightning.gather import missing_rows
from pyro_lightning.guides import parts_of
from pyro_lightning.params import ParamStoreModule, RowParam, RowsOfBatch
from pyro_lightning.rank_zero import warn
from pyro_lightning.reads_data import repeated_row
from pyro_lightning.row_optim import dense_stand_ins
from pyro_lightning.rows import ChosenBatch, IndexedBatch, RowSource, asked_rows, checked_rows
from pyro_lightning.tables import RowTable, row_tables, rows_of_batch


class RowHooks(LightningModule):
    """Keeps account of the rows whose parameters a guide holds."""

    guide: Any
    _pyro_param_store: ParamStoreModule
    _current_rows: RowsOfBatch | None
    _initialised: bool
    _keeps_rows: bool = True  # not known before the first run
    _source: Any = None
    _trained: torch.Tensor | None = None
    _numbered: tuple[Any, ...] = ()  # data sets, which number rows until teardown
    _identities: int | None = None
    _sites_of_data: tuple[str, ...] = ()
    _dims_by_hand: Mapping[str, int] = MappingProxyType({})

    _data_plates: dict[str, int | None]
    _columns: tuple[str, ...]

    def _row_plates(self) -> list[str]:
        """Names of the plates over the rows of a batch."""
        return [name for name in self._data_plates if name not in self._columns]

    def _whole_size(self) -> int:
        raise NotImplementedError

    def num_rows(self, batch: Any) -> int:
        """Count B, the observations in a batch."""
        raise NotImplementedError

    def _tables(self) -> list[RowTable]:
        return row_tables(parts_of(self.guide), self._row_plates())

    def _per_row(self) -> list[RowTable | RowParam]:
        """All parameters of each row, those of ``pyro.param`` statements among them."""
        return [*self._tables(), *self._pyro_param_store.row_params()]

    def _row_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of each row, by their names in this module."""
        mine = {id(table.parameter) for table in self._per_row()}
        return {name: p for name, p in self.named_parameters() if id(p) in mine}

    def _check_rows_of_guide(self) -> None:
        """Check that the guide has parameters of as many rows as there are, if it has any.

        Raises:
            ValueError: Naming a site and both numbers.
        """
        for table in self._per_row():
            rows = table.parameter.shape[table.dim]
            if rows != self._count_rows():
                raise ValueError(
                    f"the guide has parameters for {rows} rows (site '{table.site}'), but there "
                    f"are {self._count_rows()} now. A guide with latents of each row serves one "
                    "data set: make a new module, and hand over guides that have not run."
                )

    def _number_rows(self, source: RowSource | None) -> None:
        """Have the training set number its rows where the guide needs that.

        Raises:
            ValueError: When it cannot, or when the guide has parameters of another number of rows.
        """
        tables = self._per_row()
        if not tables:
            return
        self._check_rows_of_guide()
        if source is None:
            self._source = self._trained = None
            if not _makes_plates(parts_of(self.guide)):
                raise ValueError(missing_rows(tables[0].holder, tables[0].plate))
        else:
            self._warn_of_other_rows(source.dataset.source)
            self._source = source.dataset.source
            self._expect_rows(source)
            if not source.dataset.row_numbers:
                source.dataset.row_numbers = True
                self._numbered += (source.dataset,)
        # DDP would send all rows at each step; RowsOnRanks sends those of a batch.
        of_rows = self._row_parameters()
        self._ddp_params_and_buffers_to_ignore = list(of_rows)
        if self.trainer.world_size > 1 and not any(
            p.requires_grad for name, p in self.named_parameters() if name not in of_rows
        ):
            raise ValueError(
                "every parameter of this fit belongs to a row, and DistributedDataParallel serves "
                "no module without others. Rows that share nothing need no exchange of gradients: "
                "train them on one device, or parts of them by fits of their own."
            )

    def _warn_of_other_rows(self, source: int) -> None:
        """Warn where rows of another data set would go on with the parameters of those before."""
        trained = self._trained is not None and bool(self._trained.any())
        if trained and self._source not in (None, source):
            site = self._per_row()[0].site
            warn(
                f"the guide has parameters for each row (site '{site}'), which trained on another "
                "data set: row i of this one goes on with the parameters of row i of that one. If "
                "these are other rows, make a new PyroSVIModule; if they are the same, wrap the "
                "same data set again, so that this is known.",
                stacklevel=2,
            )

    def _expect_rows(self, source: RowSource) -> None:
        """Start or go on with the record of the rows that trained."""
        count = source.identities
        if self._trained is None or len(self._trained) != count:
            self._trained = torch.zeros(count, dtype=torch.bool)
        if self.trainer.world_size > 1:
            # Other ranks see other rows, in the end all of them.
            self._trained |= True if source.trained is None else source.trained

    def _mark_rows(self, batch: Any) -> None:
        """Note which rows trained."""
        if self._trained is not None and isinstance(batch, IndexedBatch):
            self._trained[torch.as_tensor(batch.rows).cpu()] = True

    def _count_rows(self) -> int:
        """How many rows have parameters: those that have a number, or N."""
        return self._whole_size() if self._identities is None else self._identities

    def _with_rows(self, batch: Any) -> Any:
        """Give a first batch some row numbers where nothing says which rows it holds."""
        if isinstance(batch, IndexedBatch):
            return batch
        return ChosenBatch(batch, torch.arange(self.num_rows(batch)) % self._count_rows())

    @contextmanager
    def _rows_of(self, batch: Any, batch_size: int, held_out: bool = False) -> Iterator[list[str]]:
        """Let the guide run on a batch's rows; yields the sites whose rows never trained."""
        parts, chosen = parts_of(self.guide), isinstance(batch, ChosenBatch)
        tables = row_tables(parts, self._row_plates())
        per_row = bool(tables or self._pyro_param_store.row_params()) or not self._initialised
        rows = None
        if per_row:
            rows = checked_rows(batch, batch_size, self._count_rows(), self._source)
        known = RowsOfBatch(self._row_plates(), rows, self._count_rows())
        by_hand = bool(self._pyro_param_store.row_params())
        if tables and rows is None and not held_out and not _makes_plates(parts):
            raise ValueError(missing_rows(tables[0].holder, tables[0].plate))
        unseen = held_out and (bool(tables) or by_hand) and self._unseen(parts, rows)
        if unseen:
            rows = torch.zeros(batch_size, dtype=torch.long)  # any: their draws are not used
            known = known._replace(rows=rows)
        # An AutoGuideList makes the plates of its hand-written parts, too.
        at_rows = rows if tables else None
        plates = rows_of_batch(parts, self._row_plates(), batch_size, at_rows, chosen)
        with self._known_rows(known), plates:
            hidden = {table.site for table in tables}.union(self._sites_of_data if by_hand else ())
            yield sorted(hidden) if unseen else []

    @contextmanager
    def _taken_rows(self, batch_size: int) -> Iterator[None]:
        """Let the guide run where rows of its parameters stand in the parameters' place."""
        parts, plates = parts_of(self.guide), self._row_plates()
        rows = torch.arange(batch_size)
        known = RowsOfBatch(plates, rows, self._count_rows())
        at_rows = rows if self._tables() else None
        with self._known_rows(known), rows_of_batch(parts, plates, batch_size, at_rows):
            yield

    @contextmanager
    def _known_rows(self, known: RowsOfBatch) -> Iterator[None]:
        self._current_rows = known
        try:
            yield
        finally:
            self._current_rows = None

    def _unseen(self, parts: list[Any], rows: torch.Tensor | None) -> bool:
        if rows is None:
            return not _makes_plates(parts)
        return self._trained is not None and not bool(self._trained[rows.cpu()].all())

    def _batch_of_rows(
        self, batch: Any, batch_size: int, rows: Any
    ) -> tuple[ChosenBatch, dict[str, int], torch.Tensor]:
        """Make a batch that stands for rows, each of them once.

        Returns the batch; the dimension of the rows, from the left, for each latent site of them;
        and the place in the batch of each row that was asked for.
        """
        if rows is None:
            places = torch.zeros(batch_size, dtype=torch.long)
            return ChosenBatch(batch, places), {}, places
        dims = {**{table.site: table.dim for table in self._tables()}, **self._dims_by_hand}
        computed = [site for site in self._sites_of_data if site not in dims]
        if computed or not dims:
            what = "has no latents in the data plate: leave rows out"
            if computed:
                what = (
                    f"computes {', '.join(map(repr, computed))} from the data of its batch: give "
                    "it the data, posterior_samples(num_samples, batch=batch)"
                )
            raise ValueError(
                "posterior_samples(rows=...) serves guides that keep parameters of each row, and "
                f"this guide {what}."
            )
        numbers = asked_rows(rows, self._count_rows())
        self._refuse_untrained(IndexedBatch(None, numbers))
        numbers, places = torch.unique(numbers, return_inverse=True)
        if self._dims_by_hand:  # such a guide makes its plate from the batch
            batch = repeated_row(batch, batch_size, len(numbers))
        return ChosenBatch(batch, numbers), dims, places

    def _refuse_untrained(self, batch: Any) -> None:
        """Refuse rows that did not train, of which the guide knows nothing."""
        if not isinstance(batch, IndexedBatch) or self._trained is None:
            return
        numbers = torch.as_tensor(batch.rows).cpu()
        missing = numbers[~self._trained[numbers]].tolist()
        if missing:
            raise ValueError(
                f"rows {', '.join(map(str, missing[:10]))} did not train, so that the guide knows "
                "nothing of them"
            )

    # -- hooks ---------------------------------------------------------------------------------

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as Lightning does, those of the rows of a batch among them."""
        if not gradient_clip_val:
            return
        with dense_stand_ins(optimizer):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def teardown(self, stage: str) -> None:
        """Leave data sets as they were."""
        for dataset in self._numbered:
            dataset.row_numbers = False
        self._numbered = ()


def _makes_plates(parts: list[Any]) -> bool:
    """Whether the user's own ``create_plates`` tells an autoguide the rows of a batch."""
    return any(part.create_plates is not None for part in parts)
