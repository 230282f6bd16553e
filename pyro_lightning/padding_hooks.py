"""Lightning's side of rows that a sampler repeats: on any number of ranks each row counts once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from pyro_lightning._lightning import loaders_of_batch, wrapped_batches
from pyro_lightning.batches import cut_batch
from pyro_lightning.gather import gather_rows
from pyro_lightning.life_cycle import LifeCycle
from pyro_lightning.padding import share_of
from pyro_lightning.processes import in_group
from pyro_lightning.rank_zero import warn
from pyro_lightning.ranks import with_own_noise
from pyro_lightning.rows import data_of


class PaddingHooks(LifeCycle):
    """Leaves out of a batch what a ``DistributedSampler`` repeats, and averages over real rows."""

    _warned_of_repeats: bool = False

    def without_repeats(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Cut off the rows that a ``DistributedSampler`` repeats to give all ranks equally many.

        The steps of this class do so by themselves. It is for metrics in steps of your own, which
        would count these rows twice. In a step of one process nothing is cut.

        Args:
            batch: The batch that a step was called with.
            batch_idx: Its number, as the step was called.
            dataloader_idx: Which of several validation or test loaders.

        Returns:
            The batch; without any row where it holds nothing but repeats.

        Example:
            >>> class Checked(PaddingHooks):
            ...     def validation_step(self, batch, batch_idx, dataloader_idx=0):
            ...         super().validation_step(batch, batch_idx, dataloader_idx)
            ...         x, y = self.without_repeats(batch, batch_idx, dataloader_idx)
            ...         self.log_mean("val_mae", (y - self.net(x)).abs().mean(), rows=len(y))
        """
        rows = self.num_rows(data_of(batch))
        return _first(batch, rows, self._real_rows(rows, batch_idx, dataloader_idx))

    def log_mean(self, name: str, mean: Any, rows: int, **options: Any) -> None:
        """Log a mean over rows, so that rows weigh the same over the batches and ranks of an epoch.

        ``self.log(..., batch_size=rows, sync_dist=True)`` does so where all ranks have equally many
        rows.

        Args:
            name: Name of the figure.
            mean: Mean over the rows of a batch; of none it may be anything.
            rows: How many.
            **options: Of ``LightningModule.log``.
        """
        # On gloo Lightning averages the ranks' sums of batch sizes and rounds the mean down, being
        # of integers (_sync_ddp): 51 and 50 rows give 50. A multiple of R has an exact mean.
        ranks = distributed.get_world_size() if in_group() else 1
        if not rows:
            mean = torch.zeros_like(mean) if isinstance(mean, torch.Tensor) else 0.0
        averaged = {"on_step": False, "on_epoch": True, "sync_dist": True, **options}
        self.log(name, mean, batch_size=rows * ranks, **averaged)

    def _real_rows(self, rows: int, batch_idx: int, dataloader_idx: int = 0) -> int:
        """Count the rows of a batch that are no repeats, of ``rows`` in all."""
        loaders = loaders_of_batch(self, dataloader_idx)
        for loader in loaders:
            share = share_of(loader, batch_sampler=wrapped_batches(loader))
            if share is None or not share.may_repeat(batch_idx):
                continue
            if len(loaders) > 1:
                self._warn_of_repeats("several loaders make a batch together", share.ranks)
            elif share.of_rows and type(self).num_rows is not LifeCycle.num_rows:
                self._warn_of_repeats("num_rows is overridden", share.ranks)
            elif (real := share.real_rows(batch_idx, rows)) is not None:
                return real
            else:
                why = "the loader makes batches in an order or of a size of its own"
                self._warn_of_repeats(why, share.ranks)
        return rows

    def _warn_of_repeats(self, why: str, ranks: int) -> None:
        if not self._warned_of_repeats:
            self._warned_of_repeats = True
            warn(
                "the DistributedSampler repeats rows to give each rank equally many, and these "
                f"count twice here: {why}, so that it is not known where they stand. Use a number "
                f"of rows that {ranks} divides, or DistributedSampler(..., drop_last=True).",
                stacklevel=2,
            )

    def _without_repeats(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> tuple[Any, int]:
        """Cut off repeats; returns with the batch how many rows count in it.

        A batch of nothing but repeats stays as it is, to be run like those of other ranks, and
        counts 0.
        """
        rows = self.num_rows(data_of(batch))
        real = self._real_rows(rows, batch_idx, dataloader_idx)
        return (_first(batch, rows, real), real) if real else (batch, 0)

    @with_own_noise
    def _loss_of_repeats(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a batch of nothing but repeats; returns its loss, and one without gradient.

        Other ranks have rows in this step: DDP, and layers such as SyncBatchNorm, wait for this
        one's run and its backward pass.
        """
        with self._rows_left_alone():
            loss = self._run(batch).loss
        nothing = loss * 0.0
        for table in self._per_row():
            # No row has a gradient, not even of zero: RowAdam would move it by momentum.
            none = torch.zeros(0, dtype=torch.long, device=table.parameter.device)
            nothing = nothing + gather_rows(table.parameter, none, table.dim).sum()
        return loss.detach(), nothing

    @contextmanager
    def _rows_left_alone(self) -> Iterator[None]:
        """Keep gradients from parameters of rows, and running averages from changing."""
        parameters = [p for p in self._row_parameters().values() if p.requires_grad]
        averages = self._baselines.get_extra_state() if self._baselines is not None else {}
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
            if self._baselines is not None:
                self._baselines.set_extra_state(averages)


def _first(batch: Any, rows: int, count: int) -> Any:
    return batch if count == rows else cut_batch(batch, rows, 0, count)
