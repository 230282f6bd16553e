"""Parameters of each row on several processes, where DDP would send all N rows at each step."""

from typing import Any

from lightning.pytorch import Callback
from torch import distributed, nn

from pyro_lightning.row_exchange import average_over_ranks_
from pyro_lightning.row_hooks import RowHooks


class RowsOnRanks(Callback):
    """Keeps the parameters of each row equal on all ranks; a step sends the rows of its batches.

    A callback, since a hook of the module is gone where a subclass has its own.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start with equal parameters of each row on all ranks, as DDP does with others."""
        for parameter in _row_parameters(pl_module):
            distributed.broadcast(parameter.data, 0)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Make the gradients of each row the mean over all ranks."""
        average_over_ranks_([p for p in _row_parameters(pl_module) if p.requires_grad])


def _row_parameters(module: Any) -> list[nn.Parameter]:
    # A Trainer keeps its callbacks, and may fit another kind of module next.
    return list(module._row_parameters().values()) if isinstance(module, RowHooks) else []
