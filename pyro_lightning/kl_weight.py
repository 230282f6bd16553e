"""The weight of the KL in the steps of a module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyro_lightning.annealing import check_weighed, telling_of_enumeration, weigh_kl


class KLWeight:
    """Weighs the KL of the latents in training steps, and in nothing else.

    The weight is a tensor that is filled anew for each step, so that a trace of the loss reads it
    as one of its inputs. It holds 1 between steps.
    """

    elbo: Any
    trainer: Any
    device: Any
    _kl_schedule: Callable[[int, int], float] | None = None
    _kl_tensor: torch.Tensor | None = None
    _kl_last: float | None = None

    @property
    def kl_weight(self) -> float | None:
        """The weight of the KL in the last training step of this fit; None where none is set."""
        return self._kl_last

    def anneal_kl(self, schedule: Callable[[int, int], float] | None) -> None:
        r"""Weigh the KL of the latents in the training steps of a fit, as ``KLAnnealing`` does.

        .. math:: -\frac{N}{B} \sum_{i=1}^{B} \log p(x_i \mid \theta, z_i) + \beta \Big[
            \log \frac{q(\theta)}{p(\theta)}
            + \frac{N}{B} \sum_{i=1}^{B} \log \frac{q(z_i \mid \theta)}{p(z_i \mid \theta)} \Big]

        is then what a step differentiates, and what ``train_loss`` shows. :meth:`loss`,
        validation and test keep :math:`\beta = 1`.

        Args:
            schedule: Returns :math:`\beta` from the optimizer steps and the epochs that are done;
                None ends it.

        Raises:
            ValueError: When the ELBO has no KL as a term of its own.
        """
        if schedule is not None:
            check_weighed(self.elbo)
        self._kl_schedule, self._kl_last = schedule, None

    @property
    def _kl_scale(self) -> torch.Tensor | None:
        """The tensor that holds the weight, where there is one; the same from fit to fit."""
        return None if self._kl_schedule is None else self._kl_tensor

    def _weighed(self, model: Any, guide: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        weight = self._kl_scale
        return (model, guide) if weight is None else weigh_kl(model, guide, weight)

    @contextmanager
    def _annealed(self) -> Iterator[None]:
        """Weigh the KL in a training step, which may set the weight again as it goes."""
        if self._kl_schedule is None:
            yield
            return
        self._set_kl_weight()
        try:
            with telling_of_enumeration():
                yield
        finally:
            if self._kl_tensor is not None:
                self._kl_tensor.fill_(1.0)

    def _set_kl_weight(self) -> None:
        """Set the weight of the next optimizer step."""
        if self._kl_schedule is None:
            return
        weight = self._kl_schedule(self.trainer.global_step, self.trainer.current_epoch)
        held, dtype = self._kl_tensor, torch.get_default_dtype()
        # Of no other precision than the step's: a scalar log-probability would take it on.
        if held is None or held.device != self.device or held.dtype != dtype:
            self._kl_tensor = held = torch.ones((), device=self.device, dtype=dtype)
        held.fill_(weight)
        self._kl_last = weight
