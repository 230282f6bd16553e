"""The LightningModule that owns model, guide and ELBO."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_lightning._lightning import stage_loader, transferred
from pyro_lightning.batches import (
    batch_arguments,
    count_rows,
    example_batch,
    first_rows,
    map_tensors,
)
from pyro_lightning.checks import check_elbo, check_leaves, check_optimizer, check_scales
from pyro_lightning.diagnosis import explained
from pyro_lightning.elbo import Estimate, estimate_elbo
from pyro_lightning.guides import (
    cut_plates,
    make_prototypes,
    parts_of,
    refuse_local_latents,
    row_plates,
)
from pyro_lightning.handlers import DataPlateMessenger, observed
from pyro_lightning.held_out import PriorMessenger, without_sites
from pyro_lightning.owner import ModelOwner
from pyro_lightning.params import complete_contexts
from pyro_lightning.plates import read_data_plates, read_names
from pyro_lightning.posterior import draws_at_once, sample_latents, sites_of_data
from pyro_lightning.row_hooks import RowHooks
from pyro_lightning.row_optim import rowwise
from pyro_lightning.rows import IndexedBatch, data_of, row_source
from pyro_lightning.sizes import batch_weight, dataset_size_of, mean_batch_size
from pyro_lightning.states import preserved_state
from pyro_lightning.tables import FullSizeMessenger, plates_of_prototype

_STATE_N = "PyroSVIModule(..., dataset_size=N), or an attribute dataset_size of the datamodule"


class PyroSVIModule(RowHooks, ModelOwner):
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
        elbo: A ``Trace_ELBO`` (the default), ``TraceMeanField_ELBO`` or ``TraceEnum_ELBO``.
        optimizer: A callable from parameters to a torch optimizer; Adam at 1e-2 by default.
        lr_scheduler: A callable from the optimizer to a scheduler, or to Lightning's dict of one.
        data_plate: Name, or names, of the plate over observations. A dict of sizes where plates
            cross, as rows by columns: ``{"users": n_users, "items": n_items}``; the first is over
            the rows of a batch, the B of another is its own size in the model. None scales
            nothing: for a model that scales itself by :meth:`scale_factor`, or has local latents
            only.
        scale_sites: Names of observed sites outside every data plate that are scaled by N/B too.
        dataset_size: N, where it cannot or should not be read from the training data.

    Raises:
        TypeError: When an argument is of a kind that cannot serve.
        ValueError: When model or guide is missing or given twice.

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
        guide: Any = AutoNormal,
        elbo: ELBO | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        *,
        data_plate: str | Sequence[str] | Mapping[str, int | None] | None = "data",
        scale_sites: Sequence[str] = (),
        dataset_size: int | None = None,
    ) -> None:
        super().__init__()
        self.elbo = Trace_ELBO() if elbo is None else elbo
        check_elbo(self.elbo)
        self._optimizer = optimizer or partial(torch.optim.Adam, lr=1e-2)
        check_optimizer(self._optimizer)
        self._lr_scheduler = lr_scheduler
        self._data_plates, self._columns = read_data_plates(data_plate)
        self._scale_sites = read_names(scale_sites, "scale_sites")
        stated = next(iter(self._data_plates.values()), None)
        if dataset_size is not None and dataset_size < 1:
            raise ValueError(f"dataset_size must be at least 1, got {dataset_size}")
        if dataset_size is not None and stated not in (None, dataset_size):
            raise ValueError(
                f"dataset_size={dataset_size}, but data_plate states {stated} for the plate over "
                "the rows of a batch: they are the same N"
            )
        self._given_size = self._dataset_size = dataset_size or stated
        self._mean_batch_size: float | None = None
        self._prototype: Any = None
        self._initialised = False
        self._own(model, guide, default_guide=AutoNormal)

    # -- hooks ---------------------------------------------------------------------------------

    def model_inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn a batch into the arguments of model and guide; override for other batches.

        A tuple or list becomes positional arguments, a mapping keywords, a tensor one argument.

        Returns:
            Positional arguments and keyword arguments.
        """
        return batch_arguments(batch)

    def num_rows(self, batch: Any) -> int:
        """Count B, the observations in a batch; override where rows are counted otherwise.

        Raises:
            ValueError: When the batch is empty or its tensors disagree.
        """
        return count_rows(batch)

    # -- sizes ---------------------------------------------------------------------------------

    @property
    def dataset_size(self) -> int | None:
        """N, the number of observations in the training set; None until it is known."""
        return self._dataset_size

    def _known_size(self) -> int:
        if self._dataset_size is None:
            raise RuntimeError(
                f"N, the number of training observations, is not known yet. State it: {_STATE_N}."
            )
        return self._dataset_size

    def scale_factor(self, batch: Any) -> float:
        """N/B, for a model with ``data_plate=None`` that uses ``poutine.scale`` itself."""
        return self._known_size() / self.num_rows(data_of(batch))

    def batch_weight(self, batch: Any) -> float:
        """What multiplies a batch's loss in training, so that observations weigh the same.

        It is B over the mean batch size of the epoch: exactly 1 where all batches are equal. See
        :func:`pyro_lightning.batch_weight`.
        """
        return batch_weight(self.num_rows(data_of(batch)), self._mean_batch_size)

    # -- loss ----------------------------------------------------------------------------------

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
        return self._estimate(batch).loss

    def _estimate(self, batch: Any, held_out: bool = False) -> Estimate:
        size, rows = self._known_size(), self.num_rows(data_of(batch))
        if not self._initialised:
            self._initialise(batch)
        # Validation data may outnumber the training set; training batches cannot.
        if rows > size and torch.is_grad_enabled():
            raise ValueError(
                f"this batch holds B = {rows} rows but the training set N = {size}: N is wrong. "
                f"State it: {_STATE_N}."
            )
        return self._run(batch, held_out)

    def _handler(self, batch_size: int) -> Callable[[], DataPlateMessenger]:
        """Make what scales model and guide, for a batch."""
        size = self._known_size()
        plates = {name: stated or size for name, stated in self._data_plates.items()}
        sites = dict.fromkeys(self._scale_sites, size)
        return partial(DataPlateMessenger, plates, batch_size, sites, self._columns)

    def _run(self, batch: Any, held_out: bool = False, chosen: bool = False) -> Estimate:
        data = data_of(batch)
        rows = self.num_rows(data)
        args, kwargs = self.model_inputs(data)
        at_rows = self._rows_of(batch, rows, held_out=held_out, chosen=chosen)
        with self._isolated() as handled, at_rows as unseen:
            model, guide = handled(self.model), handled(self.guide)
            if unseen:
                model, guide = PriorMessenger(unseen)(model), without_sites(guide, unseen)
            return estimate_elbo(self.elbo, model, guide, args, kwargs, self._handler(rows))

    # -- life cycle ----------------------------------------------------------------------------

    def _initialise(self, batch: Any) -> None:
        """Make every parameter and check model and guide, on one batch; leave all else as it was.

        Outside inference mode, whose tensors cannot train; the guide's prototype without
        gradients, so that what it remembers can be copied.
        """
        with torch.inference_mode(False), preserved_state(self), self._isolated() as handled:
            batch = map_tensors(batch, lambda t: t.clone() if t.is_inference() else t)
            complete_contexts(partial(self._warm_up, batch, handled))
        data = data_of(batch)
        self._prototype = first_rows(data, 2) if type(self).num_rows is _NUM_ROWS else data
        self._initialised = True

    def _warm_up(self, batch: Any, handled: Callable[[Any], Callable[..., Any]]) -> None:
        self._check_rows_of_guide()
        data = data_of(batch)
        rows, plates = self.num_rows(data), self._row_plates()
        args, kwargs = self.model_inputs(data)
        handler, identities = self._handler(rows), self._count_rows()
        in_model, in_guide = handler(), handler()
        columns = {name: in_model.plates[name] for name in self._columns}
        model, guide = handled(self.model), handled(self.guide)
        with torch.no_grad(), explained((args, kwargs), handler, model):
            make_prototypes(
                self.guide,
                guide,
                lambda part, fn: FullSizeMessenger(part, plates, identities, columns)(
                    handler()(handled(fn))
                ),
                partial(plates_of_prototype, parts_of(self.guide), plates, rows, identities),
                (args, kwargs),
            )
            if chosen := not isinstance(batch, IndexedBatch):
                batch = IndexedBatch(data, torch.arange(rows) % identities)
            with self._rows_of(batch, rows, chosen=chosen):
                trace = poutine.trace(in_guide(guide)).get_trace(*args, **kwargs)
            poutine.replay(in_model(model), trace=trace)(*args, **kwargs)
        by_row = cut_plates(in_model) if self._data_plates else row_plates(in_model.sites, rows)
        tables = self._tables()
        served = {table.site for table in tables}
        in_rows = {(table.site, table.plate) for table in tables}
        refuse_local_latents(self.guide, in_guide.sites, by_row, in_rows)
        self._sites_of_data = sites_of_data(in_guide.sites, plates, served)
        check_scales(in_model.sites, in_guide.sites, self._data_plates)
        with torch.enable_grad():
            check_leaves(self._run(batch, chosen=chosen).loss, self)

    def setup(self, stage: str) -> None:
        """Read N and make lazy parameters, before optimizer, DDP and checkpoint need them."""
        if stage == "predict":
            return
        training = stage == "fit"
        with preserved_state(self):  # a user's hook or data set may draw random numbers
            loader = stage_loader(self.trainer, stage)
            if training or self._dataset_size is None:
                self._dataset_size = self._resolve_size(loader if training else None)
            batch = None if self._initialised or loader is None else self._first_batch(loader)
        if training:
            self._mean_batch_size = None
            source = row_source(loader)
            self._identities = source.identities if source else None
        elif self._identities is None:
            self._identities = getattr(self.trainer.datamodule, "identities", None)  # type: ignore[attr-defined]
        if batch is not None:
            self._initialise(batch)
        if training:
            self._number_rows(source)

    def _resolve_size(self, loader: Any) -> int:
        if self._given_size is not None:
            return self._given_size
        stated = getattr(self.trainer.datamodule, "dataset_size", None)  # type: ignore[attr-defined]
        if stated is not None:
            return int(stated)
        if loader is None:
            raise ValueError(
                "N, the number of training observations, is not known, and is never taken from "
                f"validation or test data. Fit first, or state it: {_STATE_N}."
            )
        return dataset_size_of(loader)

    def _first_batch(self, loader: Any) -> Any:
        # Lightning converts the module after set-up; the parameters to be made need it before.
        self.trainer.precision_plugin.convert_module(self)
        with torch.inference_mode(False):
            batch = example_batch(loader)
            return transferred(self, batch, self._parameter_device() or torch.device("cpu"))

    def configure_optimizers(self) -> Any:
        """Call ``optimizer`` with all parameters, and ``lr_scheduler`` with the optimizer.

        A ``ReduceLROnPlateau`` watches ``train_loss``; return Lightning's dict to say otherwise.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                "there is nothing to train: neither model nor guide has a parameter. Use an "
                "autoguide, or give the guide parameters."
            )
        optimizer = rowwise(self._optimizer(parameters), self._row_parameters().values())
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler = {"scheduler": scheduler, "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    # -- steps ---------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch times its :meth:`batch_weight`, and log it."""
        if self._mean_batch_size is None:
            # Known from the first step only: Lightning gives the loader its sampler after set-up.
            # Of a stream of unknown length the first batch is taken for the usual size, so that a
            # smaller one weighs less; the constant factor that is left moves no optimum.
            trainer = self.trainer
            mean = mean_batch_size(trainer.train_dataloader, trainer.num_training_batches)
            rows = self.num_rows(data_of(batch))
            self._mean_batch_size = float(rows) if mean is None else mean
        loss, whole = self._logged("train", batch)
        return loss * self.batch_weight(batch) if whole else loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``val_loss``: the validation rows, scaled to the training set's N."""
        self._logged("val", batch, held_out=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log ``test_loss``: the test rows, scaled to the training set's N."""
        self._logged("test", batch, held_out=True)

    def _logged(self, stage: str, batch: Any, held_out: bool = False) -> tuple[torch.Tensor, bool]:
        """Log a batch's loss; tells with it whether it is the whole training set's."""
        estimate = self._estimate(batch, held_out)
        size, rows = self._known_size(), self.num_rows(data_of(batch))
        # Without data plate a model either scales itself, or its loss is its batch's alone.
        whole = bool(self._data_plates or self._scale_sites) or any(
            _is_scaled(site) for site in observed(estimate.model_sites)
        )
        per_obs = estimate.loss.detach() / (size if whole else rows)
        log = partial(self.log, batch_size=rows, sync_dist=True)
        log(f"{stage}_loss", per_obs * size, on_step=False, on_epoch=True)
        training = stage == "train"
        log(f"{stage}_loss_per_obs", per_obs, on_step=False, on_epoch=True, prog_bar=True)
        if training:
            name = "train_loss_per_obs_step"
            self.log(name, per_obs, on_step=True, on_epoch=False, prog_bar=True, batch_size=rows)
        return estimate.loss, whole

    # -- results -------------------------------------------------------------------------------

    @torch.no_grad()
    def posterior_samples(self, num_samples: int, rows: Any = None) -> dict[str, torch.Tensor]:
        """Draw latents from the guide; needs no data.

        Args:
            num_samples: Number of draws.
            rows: Row numbers in the training set, whose local latents are drawn jointly with the
                globals; for guides with parameters of each row.

        Returns:
            Draws by site, on the module's device, without gradient: global latents,
            ``(num_samples, *shape of the site)``; with ``rows``, local latents as well,
            ``(num_samples, len(rows), *event)``.

        Raises:
            RuntimeError: Before the first fit or loss, when the guide has no parameters yet.
            ValueError: For rows that do not exist or never trained, or whose latents the guide
                computes from data.
        """
        if not self._initialised:
            raise RuntimeError(
                "the guide has no parameters yet: fit the module, or call loss(batch) once"
            )
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        batch = self.transfer_batch_to_device(self._prototype, self.device, 0)
        args, kwargs = self.model_inputs(batch)
        batch, local, places = self._batch_of_rows(batch, self.num_rows(batch), rows)
        count, at_once = len(batch.rows), draws_at_once(self.guide)
        with self._isolated() as handled, self._rows_of(batch, count, chosen=True):
            guide = self._handler(count)()(handled(self.guide))
            plates = self._row_plates()
            draws = sample_latents(
                guide, args, kwargs, num_samples, plates=plates, local=local, at_once=at_once
            )
        for site, dim in local.items():
            # A row that is asked for twice has one latent, and so one draw of it.
            draws[site] = draws[site].index_select(dim + 1, places.to(draws[site].device))
        return draws


_NUM_ROWS = PyroSVIModule.num_rows


def _is_scaled(site: Any) -> bool:
    return isinstance(site["scale"], torch.Tensor) or site["scale"] != 1
