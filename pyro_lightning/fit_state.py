"""What a module remembers of its fit, and of the one that goes on."""

from typing import Any

from pyro_lightning import _lightning_resuming
from pyro_lightning.signals import HeldSignals


class FitState:
    """What a module remembers of its fit for a checkpoint, and of a checkpoint for its fit.

    Attributes:
        loaded: What a checkpoint holds of the fit that goes on, until its first step.
        progress: Where that checkpoint stands.
        replaced: The training loaders, while others stand in for them.
        epoch_began: Random states when the rows of the epoch were drawn.
        before_step: torch's random states before the step that is being taken.
        before_validation: Random states before the validation that runs.
        validated: Whether the last validation has come to its end.
        updates: Whether the step that is being taken has begun to change what it cannot undo.
        stops: Whether the fit stops after this epoch, as the one that was saved was about to.
        signals: Signals that wait for the end of a step.
    """

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None
        self.progress: _lightning_resuming.Progress | None = None
        self.replaced: list[Any] | None = None
        self.epoch_began: dict[str, Any] | None = None
        self.before_step: dict[str, Any] | None = None
        self.before_validation: dict[str, Any] | None = None
        self.validated = False
        self.updates = False
        self.stops = False
        self.signals = HeldSignals()

    def __reduce__(self) -> Any:
        return FitState, ()  # it belongs to one fit in one process, and no copy of a module to that
