"""Ctrl-C, SIGTERM and SLURM's signals, which take effect after a step."""

import signal
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from pyro_lightning._lightning import signals_of
from pyro_lightning.resume import Resume


class Interrupts(Resume):
    """Has the signals of a fit wait for the end of a step, whose state a checkpoint can hold.

    Lightning raises an error, or saves, wherever the signal comes: half of the parameters may be
    those after the step.
    """

    def on_train_start(self) -> None:
        """Keep signals from here on."""
        super().on_train_start()
        self._fit_state.signals.hold(signals_of(self.trainer), _tell)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Hand over the signals that came in the meantime."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._hand_over_signals(self._signals_of_all())

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hand over signals; not on several processes, which may have other numbers of batches."""
        super().on_validation_batch_end(outputs, batch, batch_idx, dataloader_idx)
        if self._in_fit() and self.trainer.world_size == 1:
            self._hand_over_signals(self._fit_state.signals.arrived)

    def on_train_end(self) -> None:
        """Have signals come when they come."""
        super().on_train_end()
        arrived = self._fit_state.signals.arrived
        if self.trainer.world_size == 1:
            self._hand_over_signals(arrived)
        self._fit_state.signals.release()

    def _signals_of_all(self) -> list[int]:
        """List the signals that any process got, in one order on all of them.

        They act on a signal together, after the same step: one alone would wait for the others.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return self._fit_state.signals.arrived
        flags = torch.zeros(signal.NSIG, device=self.trainer.strategy.root_device)
        flags[self._fit_state.signals.arrived] = 1
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return flags.nonzero().flatten().tolist()

    def _hand_over_signals(self, signals: list[int]) -> None:
        for number in signals:
            self._fit_state.signals.hand_over(number)
            if number == signal.SIGTERM:
                raise SIGTERMException  # as Lightning does, after the validation that may follow


def _tell(number: int) -> None:
    if number == signal.SIGINT:
        rank_zero_info("Ctrl-C: the fit stops after this step. Press it again to stop at once.")
