"""Refusals of what ``steps_per_batch`` cannot do."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder

from pyro_lightning._lightning import checkpoint_triggers
from pyro_lightning.closures import is_library
from pyro_lightning.rank_zero import warn

# What Lightning calls under automatic optimization only, and the remedy.
_HOOKS = {
    "training_step": "it takes the optimizer's steps itself, so that a loss which is returned "
    "trains nothing. Multiply the loss by overriding batch_weight(batch), add to it by pyro.factor "
    "in the model, or leave steps_per_batch out",
    "configure_gradient_clipping": "Lightning does not call it where a training step takes the "
    "optimizer's steps. Clip in on_before_optimizer_step(optimizer), with self.clip_gradients("
    "optimizer, 1.0), or leave steps_per_batch out",
}


def refuse_hooks(module: LightningModule, steps: int) -> None:
    """Refuse overridden hooks that would not do what they do at K = 1.

    Raises:
        ValueError: Naming the hook and the remedy.
    """
    for name, why in _HOOKS.items():
        if not is_library(getattr(getattr(module, name), "__module__", None) or ""):
            raise ValueError(
                f"{type(module).__name__} overrides {name}, and has steps_per_batch={steps}: {why}."
            )


def refuse_checkpoints(trainer: Trainer, steps: int) -> None:
    """Refuse ``ModelCheckpoint`` callbacks that would leave out checkpoints.

    Raises:
        ValueError: Naming the argument, and values that serve.
    """
    for every, by_time in checkpoint_triggers(trainer):
        if every % steps:
            less, more = every // steps * steps, -(-every // steps) * steps
            serves = f"{more}" if not less else f"{less} or {more}"
            raise ValueError(
                f"ModelCheckpoint(every_n_train_steps={every}), and steps_per_batch={steps}: "
                f"checkpoints are written after a batch of the loader, every {steps} steps. Say "
                f"every_n_train_steps={serves}, or another multiple of {steps}."
            )
        if by_time:
            raise ValueError(
                "ModelCheckpoint(train_time_interval=...) is ignored by Lightning where a training "
                f"step takes the optimizer's steps, and steps_per_batch is {steps}. Use "
                "every_n_train_steps or every_n_epochs, or leave steps_per_batch out."
            )


def refuse_lr_finder(trainer: Trainer, steps: int) -> None:
    """Refuse Lightning's search of a learning rate, which takes a batch for a step.

    Raises:
        ValueError: Saying how to search.
    """
    if any(isinstance(each, LearningRateFinder) for each in trainer.callbacks):  # type: ignore[attr-defined]
        raise ValueError(
            "Lightning's learning rate finder notes a rate and a loss for each batch of the "
            f"loader, and steps_per_batch={steps} takes as many steps in it. Search with a module "
            "of steps_per_batch=1, which takes the same steps, and give its lr to this one."
        )


def warn_of_shifted(trainer: Trainer, taken: int, steps: int) -> None:
    """Warn where batches of later epochs will end at no multiple of K.

    Args:
        trainer: In its first epoch.
        taken: Steps of a batch.
        steps: K.
    """
    if taken == steps or trainer.current_epoch > 0 or trainer.max_epochs == 1:
        return
    if any(every for every, _ in checkpoint_triggers(trainer)):
        warn(
            f"a batch of the loader holds {taken} steps and not steps_per_batch={steps}, so that "
            "batches of later epochs end at no multiple of it, where "
            "ModelCheckpoint(every_n_train_steps=...) would write. Choose a steps_per_batch that "
            "divides the steps of an epoch, or write every_n_epochs.",
            stacklevel=2,
        )


def check_parts(module: Any, parts: Any) -> None:
    """Check that a module counts as many rows in each part of a batch as were cut for it.

    Raises:
        ValueError: When rows are not in dimension 0.
    """
    for number in range(len(parts)):
        found, expected = module.num_rows(parts.data_of(number)), parts.rows_of(number)
        if found != expected:
            raise ValueError(
                f"steps_per_batch cuts the tensors of a batch in dimension 0, and num_rows counts "
                f"{found} rows, not {expected}, in a part of {expected} of {parts.rows}. Put the "
                "rows in dimension 0 of the batch, and transpose in model_inputs or in the model; "
                "or leave steps_per_batch out."
            )
