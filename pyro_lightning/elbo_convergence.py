"""The callback that stops a fit once its iterates are stationary and their mean is exact."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from pyro_lightning.arguments import read_count, read_number
from pyro_lightning.iterates import Trail, best_r_hat, exactness, split_r_hat
from pyro_lightning.rank_zero import warn
from pyro_lightning.running_mean import RunningMean
from pyro_lightning.served import check_served
from pyro_lightning.tracked_entries import TrackedEntries

_KEY = "pyro_lightning_iterate"


class ELBOConvergence(Callback):
    r"""Stops once parameters move about a mean, whose Monte Carlo error is small; takes that mean.

    At a constant learning rate the iterates :math:`\lambda_t` of stochastic optimization do not
    come to rest: they become a stationary series about the optimum, and a loss that is least by
    chance says nothing. Two phases follow each other:

    1. until :math:`\max_i \hat R_i` of the last iterates, split in two, is below ``r_hat``;
    2. from there on the iterates are averaged, :math:`\bar\lambda = \frac{1}{S} \sum_t \lambda_t`,
       until :math:`\hat R` is below ``r_hat`` still, each series has an effective sample size of
       ``ess``, and the Monte Carlo standard errors of means are below ``mcse``: of the locations of
       Normal autoguides in sds of the guide, of the logarithms of their scales as they are. A
       series that moves by less than that in all needs no sample size; parameters of networks and
       other guides have no unit, and their sample size decides.

    The mean is the result: from the second phase on validation runs with it, a checkpoint's
    ``state_dict`` holds it, and the module has it after the fit. A fit that ends before has its
    mean so far, or in the first phase its last iterate, with a warning.

    Tracked are ``max_tracked`` entries of all trainable parameters of model and guide but those of
    single rows, evenly spread if there are more, in up to ``4 * window`` iterates, which are
    thinned as they come to be more. Averaged are all of these parameters; buffers and parameters of
    rows, which move in steps of their own, keep their last value. Iterates are those after a batch
    of the loader: one of K with ``steps_per_batch=K``. Another learning rate, and a KL weight below
    1, begin the first phase anew.

    ``r_hat``, ``ess`` and ``mcse`` are logged as they are looked at, each ``window / 2`` iterates
    kept.

    Args:
        r_hat: What :math:`\hat R` must be below.
        ess: Effective sample size that each tracked series must have.
        mcse: Standard error of the mean, in standard deviations of the guide, where it is one of
            ``AutoNormal``, ``AutoDiagonalNormal`` and ``AutoMultivariateNormal``.
        window: Iterates that are needed to judge a phase.
        max_tracked: Entries of parameters that are tracked.

    Attributes:
        converged: Whether the fit has stopped by this criterion.
        stationary_at: The optimizer step with which averaging began; None before.

    Raises:
        TypeError: For arguments of a wrong kind, or another module than a ``PyroSVIModule``.
        ValueError: For numbers that cannot be; beside a ``WeightAveraging`` callback, which puts
            another mean in the same place; and beside ``ModelCheckpoint(save_weights_only=True)``,
            in which Lightning lets no callback put a mean.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from lightning.pytorch import Trainer
        >>> from pyro_lightning import ArrayDataModule, ELBOConvergence, PyroSVIModule
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
        >>> stop = ELBOConvergence(window=50, mcse=0.1)
        >>> trainer = Trainer(accelerator="cpu", max_epochs=500, logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False, callbacks=[stop])
        >>> svi = PyroSVIModule(model, optimizer=lambda p: torch.optim.Adam(p, lr=0.1))
        >>> trainer.fit(svi, datamodule=ArrayDataModule(torch.ones(90), batch_size=9))
        >>> stop.converged
        True

    Source: Dhaka et al. 2020, "Robust, accurate stochastic optimization for variational inference";
    Welandawe et al. 2022, "Robust, automated, and accurate black-box variational inference".
    """

    def __init__(
        self,
        r_hat: float = 1.1,
        ess: float = 20.0,
        mcse: float = 0.05,
        window: int = 200,
        max_tracked: int = 1000,
    ) -> None:
        self.r_hat = read_number(r_hat, "r_hat", positive=True)
        if self.r_hat <= 1:
            raise ValueError(f"r_hat must be above 1, which it comes near to, got {r_hat}")
        self.ess = read_number(ess, "ess", positive=True)
        self.mcse = read_number(mcse, "mcse", positive=True)
        self.window = read_count(window, "window", least=20)
        self.max_tracked = read_count(max_tracked, "max_tracked")
        self._forget()

    def _forget(self) -> None:
        self.converged = False
        self._told = False
        self._rates: list[float] = []
        self._rates_of_batch: list[float] = []
        self._step = 0
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._tracked = TrackedEntries({}, self.max_tracked)
        self._begin()

    def _begin(self) -> None:
        """Begin the first phase."""
        self.stationary_at: int | None = None
        self._mean: RunningMean | None = None
        self._averaged = 0
        self._found: dict[str, float] = {}
        self._restart()

    def _restart(self) -> None:
        """Forget the iterates."""
        self._trail, self._since = Trail(4 * self.window), 0

    @property
    def averaged(self) -> int:
        """How many iterates are in the mean."""
        return self._averaged if self._mean is None else self._mean.count

    # -- a fit -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begin a fit."""
        if stage != "fit":
            return
        check_served(self, pl_module)
        if any(isinstance(each, WeightAveraging) for each in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "ELBOConvergence and WeightAveraging both put a mean of the iterates in the place "
                "of the last: leave one out."
            )
        saving = (each for each in trainer.callbacks if isinstance(each, ModelCheckpoint))  # type: ignore[attr-defined]
        if any(each.save_weights_only for each in saving):
            raise ValueError(
                "ModelCheckpoint(save_weights_only=True) lets no callback put in what is saved, so "
                "that it would hold the last iterate and not the mean that is validated. Leave "
                "save_weights_only out."
            )
        self._forget()

    def _find(self, pl_module: Any) -> None:
        """Find the parameters that are averaged, and the entries that are tracked."""
        rows = {id(parameter) for parameter in pl_module._row_parameters().values()}
        self._parameters = {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if parameter.requires_grad and id(parameter) not in rows
        }
        self._tracked = TrackedEntries(self._parameters, self.max_tracked)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Find the parameters, which set-up has made, on their device."""
        self._find(pl_module)
        self._trail.to(pl_module.device)
        if self._mean is not None:
            self._mean.to_parameters()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the learning rates, which schedulers have changed when the batch is over."""
        self._rates_of_batch = [
            float(group["lr"]) for each in trainer.optimizers for group in each.param_groups
        ]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take note of the iterate, and stop where the criterion is met."""
        if trainer.global_step == self._step or not self._tracked:
            return  # gradients are added up
        self._step = trainer.global_step
        weight = pl_module.kl_weight
        rates = self._rates_of_batch
        if rates != self._rates or (weight is not None and weight < 1):
            if rates != self._rates and self._rates and not self._told:
                self._told = True
                warn(
                    "the learning rate changes, and ELBOConvergence begins anew: it judges, and "
                    "averages, iterates of a constant one. Leave lr_scheduler out, or let it "
                    "change the rate seldom.",
                    stacklevel=2,
                )
            self._begin()
            self._rates = rates
            if weight is not None and weight < 1:
                return
        if self._mean is not None:
            self._mean.add()
        if self._trail.comes():
            self._trail.keep(self._tracked.values())
            self._since += 1
            if self._since >= self.window // 2:
                self._since = 0
                self._judge(trainer, pl_module)

    def _judge(self, trainer: Trainer, pl_module: Any) -> None:
        iterates = self._trail.values().cpu().double()
        if self._mean is None:
            r_hat = best_r_hat(iterates, self.window)
            if r_hat is None:
                return
            self._found = {"r_hat": r_hat}
            if trainer.strategy.broadcast(r_hat < self.r_hat):
                self.stationary_at = trainer.global_step
                self._mean = RunningMean(self._parameters)
                self._restart()
        elif len(iterates) >= self.window:
            exact = exactness(iterates, self._tracked.units(pl_module.guide), self.mcse)
            self._found = {"r_hat": float(split_r_hat(iterates).max()), **exact._asdict()}
            met = (
                self._found["r_hat"] < self.r_hat
                and self._found["ess"] >= self.ess
                and self._found["mcse"] <= self.mcse
            )
            if trainer.strategy.broadcast(met):
                self.converged = trainer.should_stop = True
                rank_zero_info(f"The iterates have converged: {self._told_of()}.")
        for name, value in self._found.items():
            pl_module.log(name, value, on_step=True, on_epoch=False)

    def _told_of(self) -> str:
        names = {"r_hat": "R-hat", "ess": "ESS", "mcse": "MCSE"}
        found = [f"{names[name]} {value:.3g}" for name, value in self._found.items()]
        return ", ".join([*found, *([f"{self.averaged} iterates averaged"] * bool(self.averaged))])

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Put the mean in the place of the last iterate."""
        if not self.converged and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            wanted = "had an exact mean" if self._mean else "were stationary"
            result = "their mean so far" if self._mean else "the last of them"
            warn(
                f"the fit has ended before its iterates {wanted}, as ELBOConvergence asks "
                f"({self._told_of() or 'too few to tell'}; asked are R-hat < {self.r_hat:g}, "
                f"ESS >= {self.ess:g}, MCSE <= {self.mcse:g}). The result is {result}. Train for "
                "longer.",
                stacklevel=2,
            )
        if self._mean is not None:
            self._mean.swap()
            self._averaged, self._mean = self._mean.count, None

    # -- the mean in the place of the iterate ------------------------------------------------------

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Validate the mean."""
        if self._mean is not None:
            self._mean.swap()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Go on with the iterate."""
        self._unswap()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Have callbacks that save find the iterate where it belongs."""
        self._unswap()

    def _unswap(self) -> None:
        if self._mean is not None and self._mean.swapped:
            self._mean.swap()

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where the fit stands."""
        return {
            "converged": self.converged,
            "told": self._told,
            "rates": list(self._rates),
            "step": self._step,
            "since": self._since,
            "stationary_at": self.stationary_at,
            "averaged": self.averaged,
            "found": dict(self._found),
            "averages": self._mean is not None,
            "trail": self._trail.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.converged, self._told = state_dict["converged"], state_dict["told"]
        self._rates, self._step = list(state_dict["rates"]), state_dict["step"]
        self._since, self._found = state_dict["since"], dict(state_dict["found"])
        # A fit that was over has given its mean to the module, and another begins there.
        if state_dict["averages"] or state_dict["stationary_at"] is None:
            self.stationary_at = state_dict["stationary_at"]
            if self._mean is not None:
                self._mean.count = state_dict["averaged"]
            self._trail.load_state_dict(state_dict["trail"])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Put the mean in the place of the weights, and the iterate beside them."""
        if self._mean is None:
            return
        checkpoint[_KEY] = self._mean.iterates()
        means = {id(self._parameters[name]): mean for name, mean in self._mean.means().items()}
        # A parameter that has two names is in a state_dict twice.
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            if id(parameter) in means and name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = means[id(parameter)]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Put the iterate back, to go on from it."""
        if _KEY not in checkpoint or trainer.state.fn != "fit":
            return
        self._find(pl_module)
        self._mean = RunningMean(self._parameters)
        self._mean.restore(checkpoint[_KEY])  # load_state_dict follows, with the count
