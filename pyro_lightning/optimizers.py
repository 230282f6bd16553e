"""The optimizer and schedulers of a fit: made, and stepped where Lightning leaves that to us."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pyro_lightning.arguments import shortly
from pyro_lightning.fit_sizes import FitSizes
from pyro_lightning.indexed_params import warn_of_indexed
from pyro_lightning.learning_rate import set_learning_rate
from pyro_lightning.retold import telling
from pyro_lightning.row_optim import rowwise

# What Lightning ignores of a scheduler, with a warning, where optimization is manual.
_OURS = ("reduce_on_plateau", "monitor", "strict")


class Optimizers(FitSizes):
    """Makes the optimizer of all parameters, and steps schedulers under manual optimization."""

    _optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    _lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None
    _watched: Mapping[str, Any] = MappingProxyType({})
    _indexed: tuple[str, ...] = ()

    def configure_optimizers(self) -> Any:
        """Call ``optimizer`` with all parameters, and ``lr_scheduler`` with the optimizer.

        A ``ReduceLROnPlateau`` watches ``train_loss``; return Lightning's dict to say otherwise.
        With ``steps_per_batch`` it cannot have ``interval="step"``.
        """
        if not self._initialised:
            raise RuntimeError(
                "not all parameters exist yet, and an optimizer made now would miss them: fit the "
                "module, or call loss(batch) once"
            )
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                "there is nothing to train: neither model nor guide has a parameter. Use an "
                "autoguide, or give the guide parameters."
            )
        with telling("optimizer(parameters)"):
            made = self._optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must return a torch optimizer of the parameters, got {shortly(made)}"
            )
        set_learning_rate(made, self.__dict__.get("lr"))
        optimizer = rowwise(made, self._row_parameters().values())
        warn_of_indexed(self._indexed, dict(self.named_parameters()), optimizer)
        if self._lr_scheduler is None:
            return optimizer
        with telling("lr_scheduler(optimizer)"):
            scheduler = self._lr_scheduler(optimizer)
        if not (isinstance(scheduler, Mapping) or hasattr(scheduler, "step")):
            raise TypeError(
                "lr_scheduler must return a scheduler, or Lightning's dict of one, got "
                f"{shortly(scheduler)}"
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler = {"scheduler": scheduler, "monitor": "train_loss"}
        if self.steps_per_batch > 1 and isinstance(scheduler, Mapping):
            self._watched = {key: scheduler[key] for key in _OURS if key in scheduler}
            watches = isinstance(scheduler.get("scheduler"), ReduceLROnPlateau)
            of_steps = scheduler.get("interval", "epoch") == "step"
            if of_steps and self._watched.get("reduce_on_plateau", watches):
                raise ValueError(
                    "a scheduler that watches a figure, with interval='step' and steps_per_batch="
                    f"{self.steps_per_batch}: not every step has a figure to watch. Leave interval "
                    "out, so that it watches that of the epoch, or leave steps_per_batch out."
                )
            scheduler = {key: item for key, item in scheduler.items() if key not in _OURS}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _step_schedulers(self, interval: str, index: int) -> None:
        """Step the schedulers that are due after a step or an epoch, counted from 0.

        Lightning leaves them to the module where optimization is manual.
        """
        for config in self.trainer.lr_scheduler_configs:
            if config.interval != interval or (index + 1) % config.frequency:
                continue
            value = None
            plateau = isinstance(config.scheduler, ReduceLROnPlateau)
            if self._watched.get("reduce_on_plateau", plateau):
                if interval == "step":  # of a configure_optimizers of the user's own
                    continue
                monitor = self._watched.get("monitor")
                value = self.trainer.callback_metrics.get(str(monitor))
                if value is None and self._watched.get("strict", True):
                    raise ValueError(
                        f"ReduceLROnPlateau watches '{monitor}', which is not logged. "
                        f"Logged are: {', '.join(sorted(self.trainer.callback_metrics))}"
                    )
                if value is None:
                    continue
            self.lr_scheduler_step(config.scheduler, value)
