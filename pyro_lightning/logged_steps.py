"""The step that loggers are told, where one training step takes several of the optimizer."""

from pyro_lightning._lightning import BeforeTrainingBatch, tell_loggers
from pyro_lightning.padding_hooks import PaddingHooks


def logged_step(first: int, stop: int, every: int) -> int:
    """Return the one of a batch's optimizer steps whose number its figures are logged under.

    It is the last that is due, where one is: Lightning logs a step, counted from 0, if the number
    after it is a multiple of ``log_every_n_steps``.

    Args:
        first: The first of the steps, counted from 0.
        stop: The one after the last.
        every: ``log_every_n_steps``; 0 logs none.

    Example:
        >>> [logged_step(first, first + 4, every=10) for first in (0, 4, 8, 12, 16)]
        [3, 7, 9, 15, 19]
    """
    due = stop // every * every if every else 0
    return due - 1 if due > first else stop - 1


class LoggedSteps(PaddingHooks, BeforeTrainingBatch):
    """Has loggers count optimizer steps, of which Lightning sees but the batches of the loader.

    A metric named "step" would change the loggers' count, too, but it is another than that of
    checkpoints' names: those count the steps that are done.
    """

    steps_per_batch: int

    def before_training_batch(self) -> None:
        """Count on K steps, for callbacks that log at the start of a batch."""
        if self.steps_per_batch > 1:
            self._tell_loggers(self.trainer.global_step, self.steps_per_batch)

    def _tell_loggers(self, first: int, steps: int) -> None:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        tell_loggers(self.trainer, logged_step(first, first + steps, every))

    def on_validation_model_zero_grad(self) -> None:
        """Log the figures of a validation in a fit at the last step; clear gradients."""
        if self.steps_per_batch > 1:
            tell_loggers(self.trainer, self.trainer.global_step - 1)
        super().on_validation_model_zero_grad()

    def on_train_epoch_end(self) -> None:
        """Log the figures of an epoch at its last step."""
        if self.steps_per_batch > 1:
            # Lightning takes one off, where it logs an epoch.
            tell_loggers(self.trainer, self.trainer.global_step)
