"""What a fit knows of its data: N, the mean batch size, and which rows have a number."""

import math
from typing import Any

from pyro_lightning._lightning import stage_loader, unshared
from pyro_lightning.arguments import read_count
from pyro_lightning.loader_lists import each_loader
from pyro_lightning.rows import RowSource, data_of, row_source
from pyro_lightning.runs import STATE_N, Runs
from pyro_lightning.sizes import cut_sizes, dataset_size_of, mean_batch_size, refuse_no_batch
from pyro_lightning.states import preserved_state
from pyro_lightning.streams import check_shares, resume_once
from pyro_lightning.uneven import RowsOfRanks


class FitSizes(Runs):
    """Reads sizes from the loaders of a fit, or of an evaluation."""

    steps_per_batch: int = 1
    _given_size: int | None
    _rows_per_step: int | None = None
    _mean_batch_size: float | None = None
    _followed: Any = None
    _rows_of_ranks: RowsOfRanks = RowsOfRanks()

    def _read_data(self, stage: str) -> tuple[Any, RowSource | None]:
        """Ask for the loader of a stage; read N, and which rows have a number."""
        training, source = stage == "fit", None
        with preserved_state(self):  # a user's hook or data set may draw random numbers
            loader = stage_loader(self.trainer, stage)
            if training:
                check_shares(loader, self.trainer.world_size, self.trainer.global_rank)
                refuse_no_batch(loader)
            if training or self._dataset_size is None:
                self._dataset_size = self._resolve_size(loader if training else None)
            if not training:
                loader = next(each_loader(loader), None)
        if training:
            self._mean_batch_size = self._followed = None
            self._rows_of_ranks = RowsOfRanks()
            source = row_source(loader)
            self._identities = source.identities if source else None
        elif self._identities is None:
            evaluated = row_source(loader)  # its rows may be a part of those that have a number
            known = evaluated and evaluated.dataset.row_numbers and evaluated.identities
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            self._identities = known or getattr(datamodule, "identities", None)
        return loader, source

    def on_validation_start(self) -> None:
        """Refuse to validate without N."""
        if self._dataset_size is None:
            self._resolve_size(None)

    def on_test_start(self) -> None:
        """Refuse to test without N."""
        if self._dataset_size is None:
            self._resolve_size(None)

    def _size_is_stated(self) -> bool:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        stated = self._given_size, getattr(datamodule, "dataset_size", None)
        return any(size is not None for size in stated)

    def _follow_loader(self, batch: Any) -> None:
        """Read the mean batch size of the loader that trains, and N anew once it is another.

        Known from the first step only: Lightning gives the loader its sampler after set-up, and may
        reload it in any epoch.
        """
        loader, count = self.trainer.train_dataloader, self.trainer.num_training_batches
        mean = mean_batch_size(loader, count)
        if self._followed == (id(loader), count, mean):
            return
        resume_once(loader)
        if self._followed is not None:
            self._dataset_size = self._resolve_size(loader)
        self._followed = id(loader), count, mean
        rows = self.num_rows(data_of(batch))
        if self.steps_per_batch > 1:
            self._rows_per_step, mean = cut_sizes(loader, count, rows, self.steps_per_batch)
        # Of a stream of unknown length the first batch is taken for the usual size, so that a
        # smaller one weighs less; the constant factor that is left moves no optimum.
        of_ranks = self._rows_of_ranks
        if mean is not None and of_ranks.mean is not None:
            # All take as many steps as the rank with most rows, which is no rank's own number.
            split = self._rows_per_step if self.steps_per_batch > 1 else None
            mean = of_ranks.mean / (math.ceil(of_ranks.most / split) if split else count)
        self._mean_batch_size = float(self._rows_per_step or rows) if mean is None else mean

    def _resolve_size(self, loader: Any) -> int:
        if self._given_size is not None:
            return self._given_size
        stated = getattr(self.trainer.datamodule, "dataset_size", None)  # type: ignore[attr-defined]
        if stated is not None:
            return read_count(stated, "dataset_size of the datamodule")
        if loader is None:
            raise ValueError(
                "N, the number of training observations, is not known, and is never taken from "
                f"validation or test data. Fit first, or state it: {STATE_N}."
            )
        return dataset_size_of(unshared(loader))
