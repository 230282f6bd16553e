"""The callback that anneals the weight of the KL."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Callback, Trainer

from pyro_lightning.annealing import rising_weight
from pyro_lightning.arguments import read_count, read_flag, read_fraction, read_number
from pyro_lightning.logged_steps import logged_step
from pyro_lightning.module import PyroSVIModule
from pyro_lightning.rank_zero import warn
from pyro_lightning.served import check_served


class KLAnnealing(Callback):
    r"""Lets the weight of the KL rise to 1, and stay there: linearly, or in cycles.

    .. math:: -\operatorname{E}_q \log p(x \mid \theta, z)
        + \beta_t \operatorname{KL}(q(\theta, z) \,\|\, p(\theta, z))

    is the loss of step t, a sum over N observations in nats. Only the terms of latents have the
    weight, in model and guide, each with its N/B; factors of the model and latents that it sums
    out are the likelihood's. ``train_loss`` and its like are of the annealed loss, ``kl_weight``
    is logged beside them; ``val_loss``, ``test_loss`` and ``svi.loss`` have weight 1, and compare
    over a fit. The weight follows from the number of the step, so that a fit goes on from a
    checkpoint with the weights that it would have had.

    Args:
        steps: T, optimizer steps until the weight is 1 for good. With ``steps_per_batch=K`` a batch
            of the loader has K of them.
        epochs: T in epochs, in which the weight is constant, in place of ``steps``.
        start: :math:`\beta_0`, the weight that it rises from.
        cycles: M, how many times it rises within T.
        ramp: R, the share of each cycle in which it rises, before it stays at 1 for the rest of it:
            1 for one cycle, 0.5 for more by default.
        unlimited: Whether a fit may have no end that is known: no ``max_epochs`` and no
            ``max_steps``, or ``steps`` and a loader without length.

    Raises:
        TypeError: For arguments of a wrong kind, or another module than a ``PyroSVIModule``.
        ValueError: When both or none of ``steps`` and ``epochs`` are given; at the start of a fit,
            when it ends before the weight is 1, or has an ELBO without a KL of its own
            (``RenyiELBO``, ``ReweightedWakeSleep``, ``TraceTMC_ELBO``, ``Trace_MMD``,
            ``EnergyDistance``).
        RuntimeError: When a subclass's ``training_step`` does not call this library's.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_lightning import ArrayDataModule, KLAnnealing, PyroSVIModule
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
        >>> trainer = Trainer(accelerator="cpu", max_epochs=3, logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False, callbacks=[KLAnnealing(epochs=2)])
        >>> svi = PyroSVIModule(model)
        >>> trainer.fit(svi, datamodule=ArrayDataModule(torch.zeros(9), batch_size=3))
        >>> float(trainer.callback_metrics["kl_weight"])
        1.0

    Source: Bowman et al. 2016, "Generating sentences from a continuous space"; in cycles: Fu et al.
    2019, "Cyclical annealing schedule".
    """

    def __init__(
        self,
        steps: int | None = None,
        epochs: int | None = None,
        start: float = 0.0,
        cycles: int = 1,
        ramp: float | None = None,
        unlimited: bool = False,
    ) -> None:
        if (steps is None) == (epochs is None):
            raise ValueError(
                "KLAnnealing takes either steps or epochs, how many until the weight is 1: "
                f"got steps={steps} and epochs={epochs}"
            )
        self.by_epoch = steps is None
        name = "epochs" if self.by_epoch else "steps"
        self.length = read_count(epochs if self.by_epoch else steps, name)
        self.start, self.cycles = read_fraction(start, "start"), read_count(cycles, "cycles")
        if self.cycles > self.length:
            raise ValueError(f"{cycles} cycles do not fit into {name}={self.length}")
        ramp = (1.0 if self.cycles == 1 else 0.5) if ramp is None else ramp
        self.ramp = read_number(ramp, "ramp", positive=True)
        if self.ramp > 1:
            raise ValueError(f"ramp must lie in (0, 1], got {ramp}")
        self.unlimited = read_flag(unlimited, "unlimited")
        self._before = 0

    def weight(self, steps: int, epochs: int) -> float:
        """Return the weight of the step after ``steps`` optimizer steps and ``epochs`` epochs."""
        return self._schedule()(steps, epochs)

    def _schedule(self) -> Callable[[int, int], float]:
        form = partial(
            rising_weight,
            length=self.length,
            start=self.start,
            cycles=self.cycles,
            ramp=self.ramp,
        )
        return partial(_scheduled, form, self.by_epoch)

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Have the module weigh the KL."""
        if stage != "fit":
            return
        check_served(self, pl_module)
        if sum(isinstance(each, KLAnnealing) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError("two KLAnnealing callbacks would set one weight: leave one out")
        pl_module.anneal_kl(self._schedule())

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a fit that ends before the weight is 1."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        least = _least_length(trainer, pl_module.steps_per_batch, self.by_epoch)
        unit = "epochs" if self.by_epoch else "steps"
        if least is None:
            if not self.unlimited:
                raise ValueError(
                    f"the fit has no end that is known in {unit}, and KLAnnealing({unit}="
                    f"{self.length}) is to end before it. Give the Trainer max_epochs or max_steps "
                    f"(steps that end annealing need max_steps where the loader has no length), or "
                    f"say that this is meant: KLAnnealing({unit}={self.length}, unlimited=True)."
                )
        elif self.length >= least:
            raise ValueError(
                f"KLAnnealing({unit}={self.length}) would not be over when the fit is, after "
                f"{least} {unit}, and what comes out would be no posterior. Give it fewer, so that "
                f"steps with weight 1 follow, or the Trainer more."
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the steps before those of a batch."""
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the weight of a step that loggers will have."""
        if pl_module.kl_weight is None:
            raise RuntimeError(
                f"{type(pl_module).__name__}.training_step does not call super().training_step, "
                "which weighs the KL, and KLAnnealing would do nothing. Call it, or leave the "
                "callback out."
            )
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        first, after = self._before, trainer.global_step
        if every and after // every > first // every:
            weight = self.weight(logged_step(first, after, every), trainer.current_epoch)
            pl_module.log("kl_weight", weight, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the weight of the last step."""
        if pl_module.kl_weight is not None:
            # Equal on all ranks, as Lightning cannot know.
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True}
            pl_module.log("kl_weight", pl_module.kl_weight, **options)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Warn of a fit that was stopped too early."""
        weight = pl_module.kl_weight
        if weight is not None and weight < 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            warn(
                f"the fit has ended at KL weight {weight:.3g}, before KLAnnealing had: what it has "
                "found is no posterior. Anneal for less long, or stop later.",
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave no weight behind."""
        self._end(pl_module)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Leave no weight behind."""
        if stage == "fit":
            self._end(pl_module)

    def _end(self, pl_module: Any) -> None:
        if isinstance(pl_module, PyroSVIModule):
            pl_module.anneal_kl(None)


def _scheduled(form: Any, by_epoch: bool, steps: int, epochs: int) -> float:
    # A function, and no method of the callback: copies of the module hold it.
    return float(form(epochs if by_epoch else steps))


def _least_length(trainer: Trainer, steps_per_batch: int, by_epoch: bool) -> int | None:
    """How many steps, or epochs, a fit has at least if nothing stops it; None without an end.

    The last batch of an epoch may hold one step where ``steps_per_batch`` others hold more.
    """
    batches, gathered = trainer.num_training_batches, trainer.accumulate_grad_batches
    max_steps = math.inf if trainer.max_steps < 0 else trainer.max_steps
    max_epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    if not math.isfinite(batches):
        known = max_epochs if by_epoch and not math.isfinite(max_steps) else math.inf
        length = known if by_epoch else max_steps
        return int(length) if math.isfinite(length) else None
    most = math.ceil(batches / gathered) * steps_per_batch  # steps of an epoch
    if by_epoch:
        # An epoch that max_steps cuts short has begun, and its weight is reached.
        length = min(max_epochs, -(-max_steps // most))
    else:
        length = min(max_steps, max_epochs * (most - steps_per_batch + 1))
    return int(length) if math.isfinite(length) else None
