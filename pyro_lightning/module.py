"""The LightningModule that owns model, guide and ELBO."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.infer import ELBO, EnergyDistance, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_lightning.after_fit import AfterFit
from pyro_lightning.arguments import read_callable, read_count, read_flag
from pyro_lightning.baselines import DecayingBaselines
from pyro_lightning.checks import check_elbo, check_optimizer
from pyro_lightning.compiled import read_compile
from pyro_lightning.fit_state import FitState
from pyro_lightning.handlers import observed
from pyro_lightning.in_hand import InHand
from pyro_lightning.layout import shapes_of, telling_contents
from pyro_lightning.metric_inputs import Given
from pyro_lightning.plates import read_data_plates, read_names
from pyro_lightning.prediction import Prediction, PredictionFields, read_prediction
from pyro_lightning.ranks import with_own_noise
from pyro_lightning.rows import data_of
from pyro_lightning.runs import STATE_N
from pyro_lightning.site_table import SiteTable, table_of_sites
from pyro_lightning.sizes import batch_weight


class PyroSVIModule(AfterFit):
    r"""Trains a Pyro model on mini-batches by stochastic variational inference.

    The loss of a batch of B of N observations is an unbiased estimate, in nats, of the negative
    ELBO of the whole training set (a sum over its N observations, not a mean):

    .. math:: -\Big[\log p(\theta) - \log q(\theta) + \frac{N}{B} \sum_{i=1}^{B}
        \log p(x_i, z_i \mid \theta) - \log q(z_i \mid \theta)\Big]

    Only terms inside the data plate are scaled by N/B. N is read from the training data, B from
    each batch.

    There are two forms. Either pass ``model`` (and ``guide``), or subclass and define
    ``model(self, *batch)`` and, if you wish, ``guide(self, *batch)`` as methods; the subclass may
    own ``nn.Module``, ``PyroParam`` and ``PyroSample`` attributes, which all train.

    Args:
        model: An ``nn.Module``, ``PyroModule`` or function that takes a batch's elements.
        guide: An autoguide class or ``functools.partial`` of one (called with the model), a guide
            instance, or a guide function.
        elbo: A ``Trace_ELBO`` (the default), ``TraceMeanField_ELBO``, ``TraceEnum_ELBO`` or
            ``TraceGraph_ELBO``. For latents in the data plate also ``RenyiELBO``,
            ``ReweightedWakeSleep`` (whose value is its bound on the log-evidence) and
            ``TraceTMC_ELBO`` (with global latents drawn once); for global latents ``Trace_MMD``;
            each of these and ``EnergyDistance`` for any model in batches of all N rows.
        optimizer: A callable from parameters to a torch optimizer; Adam at 1e-2 by default.
        lr_scheduler: A callable from the optimizer to a scheduler, or to Lightning's dict of one.
        data_plate: Name, or names, of the plate over observations. A dict of sizes where plates
            cross, as rows by columns: ``{"users": n_users, "items": n_items}``; the first is over
            the rows of a batch, the B of another is its own size in the model. None scales
            nothing: for a model that scales itself by :meth:`scale_factor`, or has local latents
            only.
        scale_sites: Names of observed sites outside every data plate that are scaled by N/B too.
        dataset_size: N, where it cannot or should not be read from the training data.
        checks: Whether sites and shapes are checked on the first batch: guide and model that do not
            match, scales that differ, rows outside the data plate or broadcast, autoguides with
            latents of rows; and whether each batch must be laid out as the first of its loader,
            with the same elements of the same types and numbers of dimensions, of which a mapping
            may leave out some. Sizes, parameters
            that would not train, a likelihood that is not scaled, an ELBO that no batch can
            estimate, and losses that are not finite are errors in any case.
        compile: Whether loss and gradients run as one compiled graph: True; ``"strict"``, where
            what cannot be compiled is an error and not a warning; or a dict of ``torch.compile``'s
            options. See :class:`pyro_lightning.compiled.CompiledLoss`.
        steps_per_batch: K, how many optimizer steps each batch of the loader, of K * B rows, is cut
            for; :class:`ArrayDataModule` cuts such batches by itself.
        save_example: Whether a checkpoint holds the first two rows of the first batch, on which
            :meth:`load_from_checkpoint` runs guide and model. False puts a constant in the place
            of every number in them.
        bad_batches: ``"raise"``, or ``"skip"`` for batches whose loss is not finite, that the model
            cannot run, that are not laid out as the first, or that a map-style data set fails to
            make. A skipped batch takes no step and leaves no trace in parameters, optimizer,
            buffers and random numbers; ``train_skipped_batches`` and ``train_skipped_rows`` count
            them, and one warning an epoch names the first. N counts the rows that can train:

            .. math:: N \leftarrow N (1 - n_\text{bad} / n_\text{seen})

            with the rows of an epoch that are bad. In an order that is new each epoch these are
            those whose terms are not finite, one where none stands out; in any other order all of
            the batch, which never train. This holds for a stated N, too. A step that is not
            taken counts in ``global_step``. Errors end the fit where no batch is to blame, such as
            parameters that are not finite, and where no batch of an epoch is good.
        prediction: What ``trainer.predict`` draws of each batch: a :class:`Prediction`, or a dict
            of its fields, which a checkpoint's hyperparameters can hold; and for metrics.
        metrics: What validation and test evaluate beside the loss: a torchmetrics ``Metric``,
            several, a ``MetricCollection``, a dict of names, or a dict of sites and several where
            more than one is observed. Each is fed what its ``update`` names: ``draws``, S posterior
            predictive draws ``(S, B, ...)``; ``preds``, their mean; ``target``; ``log_likelihood``,
            ``(S, B)``; ``loss_per_obs``; ``rows``, B. See :meth:`metrics_of`.

    Attributes:
        lr: A learning rate in the place of the optimizer's, in all of its groups, from the next fit
            on; None by default. ``Tuner.lr_find`` and ``LearningRateFinder`` set it.

    Raises:
        TypeError: When an argument is of a kind that cannot serve.
        ValueError: When model or guide is missing or given twice, or a number or name is none of
            those that are served.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
        >>> svi = PyroSVIModule(model, dataset_size=1000)
        >>> svi.loss(torch.zeros(100)).shape
        torch.Size([])
        >>> svi.posterior_samples(50)["mu"].shape
        torch.Size([50])

    Source: Hoffman et al. 2013, "Stochastic variational inference"; Pyro's SVI tutorial, part II.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        guide: Callable[[Any], AutoGuide] | Callable[..., Any] = AutoNormal,
        elbo: ELBO | EnergyDistance | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | Callable[..., Any] | None = None,
        *,
        data_plate: str | Sequence[str] | Mapping[str, int | None] | None = "data",
        scale_sites: Sequence[str] = (),
        dataset_size: int | None = None,
        checks: bool = True,
        compile: bool | str | Mapping[str, Any] = False,
        steps_per_batch: int = 1,
        save_example: bool = True,
        bad_batches: str = "raise",
        prediction: Prediction | PredictionFields | None = None,
        metrics: Given = None,
    ) -> None:
        before = set(vars(self))
        super().__init__()
        self._fit_state = FitState()
        # Of the object, so that a subclass may hold a network by this name.
        self.__dict__.setdefault("lr", None)
        self.elbo = Trace_ELBO() if elbo is None else elbo
        check_elbo(self.elbo)
        self._baselines = DecayingBaselines() if isinstance(elbo, TraceGraph_ELBO) else None
        self._optimizer = partial(torch.optim.Adam, lr=1e-2) if optimizer is None else optimizer
        check_optimizer(self._optimizer)
        expected = "a callable from the optimizer to a scheduler, or to Lightning's dict of one"
        self._lr_scheduler = read_callable(lr_scheduler, "lr_scheduler", expected)
        self._data_plates, self._columns = read_data_plates(data_plate)
        self._scale_sites = read_names(scale_sites, "scale_sites")
        stated = next(iter(self._data_plates.values()), None)
        if dataset_size is not None:
            dataset_size = read_count(dataset_size, "dataset_size")
        if dataset_size is not None and stated not in (None, dataset_size):
            raise ValueError(
                f"dataset_size={dataset_size}, but data_plate states {stated} for the plate over "
                "the rows of a batch: they are the same N"
            )
        self._given_size = self._dataset_size = dataset_size or stated
        self._prototype: Any = None
        self._initialised = False
        self._checks = read_flag(checks, "checks")
        self._save_example = read_flag(save_example, "save_example")
        self._compiled = read_compile(compile)
        self.steps_per_batch = steps_per_batch = read_count(steps_per_batch, "steps_per_batch")
        # Lightning takes one step for each batch of the loader where optimization is automatic.
        self.automatic_optimization = steps_per_batch == 1
        self._read_bad_batches(bad_batches)
        self._prediction = read_prediction(prediction)
        self._read_metrics(metrics)
        self._own(model, guide, default_guide=AutoNormal)
        # A model of the user's may read a number by the name of `lr`.
        self._names_of_library = frozenset(vars(self)).difference(before, {"lr"})

    # -- loss ----------------------------------------------------------------------------------

    def scale_factor(self, batch: Any) -> float:
        """N/B, for a model with ``data_plate=None`` that uses ``poutine.scale`` itself."""
        return self._known_size() / self.num_rows(data_of(batch))

    def batch_weight(self, batch: Any) -> float:
        """What multiplies a batch's loss in training, so that observations weigh the same.

        It is B over the mean batch size of the epoch: exactly 1 where all batches are equal. See
        :func:`pyro_lightning.batch_weight`.
        """
        if self._in_own_step():
            self._follow_loader(batch)
        return batch_weight(self.num_rows(data_of(batch)), self._mean_batch_size)

    def loss(self, batch: Any) -> torch.Tensor:
        """Estimate the negative ELBO of the whole training set from one batch.

        A sum over N observations in nats, with the B of this batch scaled by N/B. Makes lazy
        parameters at its first call. Usable without a Trainer where ``dataset_size`` is given.

        Args:
            batch: B rows, on the module's device.

        Returns:
            A scalar tensor; differentiable where gradients are enabled.

        Raises:
            RuntimeError: When N is not known.
            ValueError: When the batch is empty or larger than N, when nothing would be scaled, or
                when the loss is not finite.
        """
        with telling_contents(batch):
            loss: torch.Tensor = self._estimate(batch)[0]
        if self._in_own_step() and torch.is_grad_enabled():
            self._mark_rows(batch)
        return loss

    def _in_own_step(self) -> bool:
        """Whether a training step of the user's runs, which knows nothing of rows and loaders."""
        return self._in_hand is None and self._trainer is not None and self._trainer.training

    @with_own_noise
    def _estimate(self, batch: Any, held_out: bool = False) -> tuple[torch.Tensor, bool]:
        """Estimate the loss; tells with it whether it is the whole training set's."""
        size, rows = self._whole_size(), self.num_rows(data_of(batch))
        # One row alone cannot be compared with less, as some checks do; the example of a checkpoint
        # was not checked at all.
        trains = torch.is_grad_enabled() and not held_out
        unchecked = self._checked_rows == 1 or (trains and not self._checked_rows)
        if not self._initialised or (rows > 1 and unchecked):
            self._initialise(batch)
        elif shapes_of(batch, rows) not in self._known_shapes:
            self._check_shapes(batch)
        # Validation data may outnumber the training set; training batches cannot.
        if rows > size and torch.is_grad_enabled():
            raise ValueError(
                f"this batch holds B = {rows} rows but the training set N = {size}: N is wrong. "
                f"State it: {STATE_N}."
            )
        if self._compiled is not None and torch.is_grad_enabled() and not held_out:
            loss = self._compiled.loss(self, batch)
            if loss is not None:
                if not torch.isfinite(loss):
                    self._explain(batch, loss)
                return loss, self._whole
        estimate = self._run(batch, held_out)
        # Without data plate a model either scales itself, or its loss is its batch's alone.
        self._whole = bool(self._data_plates or self._scale_sites) or any(
            _is_scaled(site) for site in observed(estimate.model_sites)
        )
        return estimate.loss, self._whole

    # -- steps ---------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
        """Return the loss of a batch times its :meth:`batch_weight`, and log it.

        With ``steps_per_batch`` the batch is cut, and an optimizer step taken on each part.
        """
        with InHand(self, "training", batch, batch_idx, 0), self._annealed():
            if steps := self._begin():
                return self._pass_over(steps)
            self._follow_loader(batch)
            real, rows = self._without_repeats(batch, batch_idx)
            if self.steps_per_batch > 1:
                return self._log_steps(self._take_steps(batch, real, rows))
            done = self._attempt(partial(self._step_or_loss, real, rows), rows)
            if done is None:
                return self._without_step()
            loss, result = done
            self._log_step(result)
            if rows:
                self._mark_rows(real)
            return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val_loss``: the validation rows, scaled to the training set's N.

        Of several loaders each has a figure, with Lightning's suffix ``/dataloader_idx_<n>``.
        """
        with InHand(self, "validation", batch, batch_idx, dataloader_idx):
            self._log_evaluation("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``test_loss``: the test rows, scaled to the training set's N."""
        with InHand(self, "test", batch, batch_idx, dataloader_idx):
            self._log_evaluation("test", batch, batch_idx, dataloader_idx)

    # -- results -------------------------------------------------------------------------------

    def site_table(self, batch: Any) -> SiteTable:
        """List every site and parameter: kind, plates, shape, scale, log-probabilities, guide.

        Works where the checks refuse the model too; needs N. Leaves parameters, buffers and random
        states as they are. Print it, or hand it to ``rich.print``.

        Args:
            batch: B rows, on the module's device.
        """
        with telling_contents(batch):
            return table_of_sites(self, batch)


def _is_scaled(site: Any) -> bool:
    return isinstance(site["scale"], torch.Tensor) or site["scale"] != 1
