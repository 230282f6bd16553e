"""A progress bar that speaks of observations."""

import math
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

from pyro_lightning.pace import Pace, clock
from pyro_lightning.rows import data_of
from pyro_lightning.served import check_served
from pyro_lightning.watched import FailedBatch

# Lightning's own names are those of loggers.
_SHOWN = {"train_loss_per_obs": "loss/obs", "val_loss_per_obs": "val loss/obs"}


class SVIProgressBar(RichProgressBar):
    """Lightning's Rich bar with loss per observation, observations a second, and time left.

    The loss is the last step's, in nats, an N-th of the negative ELBO; ``val loss/obs`` that of the
    last validation. Observations are rows of the batches of all processes, of late; time left is
    the whole fit's, with its validations, and is shown where ``max_epochs`` or ``max_steps`` end
    it. With ``steps_per_batch=K`` the bar counts batches of the loader, which hold K * B rows.

    Args:
        refresh_rate: As in Lightning's ``RichProgressBar``.
        leave: As there.
        theme: As there.
        console_kwargs: As there.

    Raises:
        ImportError: When the extra ``rich`` is not installed.
        TypeError: For another module than a ``PyroSVIModule``.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", callbacks=[SVIProgressBar()], logger=False,
        ...     enable_checkpointing=False, enable_model_summary=False)
        >>> type(trainer.progress_bar_callback).__name__
        'SVIProgressBar'
    """

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        try:
            import rich  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "SVIProgressBar needs Rich: pip install 'pyro-lightning[rich]'"
            ) from error
        super().__init__(refresh_rate, leave, theme or RichProgressBarTheme(), console_kwargs)
        self._pace = Pace(time.monotonic())
        self._batch = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse a module whose observations are not known."""
        check_served(self, pl_module)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin to measure."""
        super().on_train_start(trainer, pl_module)
        self._pace = Pace(time.monotonic())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the epoch; what came between two is no time of the rows."""
        super().on_train_epoch_start(trainer, pl_module)
        self._pace.pause(time.monotonic())

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Show the figures of a validation, whose time is none of the rows'."""
        super().on_validation_end(trainer, pl_module)
        self._pace.pause(time.monotonic())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the rows of a batch."""
        failed = isinstance(batch, FailedBatch)
        rows = 0 if failed else pl_module.num_rows(data_of(batch)) * trainer.world_size
        self._pace.add(rows, time.monotonic())
        self._batch = batch_idx + 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """Return what stands behind the bar."""
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        shown = {_SHOWN.get(name, name): value for name, value in items.items()}
        shown["obs/s"] = f"{self._pace.rows_per_second():,.0f}"
        left = self._pace.left(_batches_left(trainer, pl_module, self._batch))
        if left is not None:
            shown["left"] = clock(left)
        return shown


def _batches_left(trainer: Trainer, pl_module: Any, done: int) -> float:
    """Count the batches of the loader that are left of a fit, ``done`` of this epoch being done."""
    of_epochs = of_steps = math.inf
    if trainer.max_epochs not in (None, -1):
        epochs = trainer.max_epochs - trainer.current_epoch
        of_epochs = epochs * trainer.num_training_batches - done
    if trainer.max_steps >= 0:
        steps = trainer.max_steps - trainer.global_step
        of_steps = (
            steps * trainer.accumulate_grad_batches / getattr(pl_module, "steps_per_batch", 1)
        )
    return min(of_epochs, of_steps)
