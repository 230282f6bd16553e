"""Ctrl-C, SIGTERM and SLURM's signals, which take effect after a step."""

import signal
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pyro_lightning._lightning import signals_of
from pyro_lightning.processes import in_group
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
        held = self._fit_state.signals
        if not in_group():
            self._hand_over_signals(held.arrived)
            return
        # Processes act on a signal together, after the same step: one alone would wait for the
        # others. What came in a step they tell while the next one runs, so that none waits.
        self._hand_over_signals(held.answer())
        held.ask(self.trainer.strategy.root_device)

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
        held = self._fit_state.signals
        if not in_group():
            self._hand_over_signals(held.arrived)
        else:
            held.answer()  # what came before the last step has not been handed over, and is asked
            held.ask(self.trainer.strategy.root_device)
            self._hand_over_signals(held.answer())
        held.release()

    def _hand_over_signals(self, signals: list[int]) -> None:
        for number in signals:
            self._fit_state.signals.hand_over(number)
            if number == signal.SIGTERM:
                raise SIGTERMException  # as Lightning does, after the validation that may follow


def _tell(number: int) -> None:
    if number == signal.SIGINT:
        rank_zero_info("Ctrl-C: the fit stops after this step. Press it again to stop at once.")
