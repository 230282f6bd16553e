"""How a module comes to its sizes, parameters and optimizer, before its first step."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import nn

from pyro_lightning._lightning import (
    stage_loader,
    transferred,
    unshared,
)
from pyro_lightning.arguments import read_count, shortly
from pyro_lightning.averages import copy_again
from pyro_lightning.batches import (
    example_batch,
    map_tensors,
)
from pyro_lightning.checks import check_leaves, check_sites, warn_of_unmet, warn_of_unscaled
from pyro_lightning.few_rows import FewRows, keep_few_rows
from pyro_lightning.first_run import (
    globals_of_data,
    indexed_by_data,
    params_of_shorter,
    rows_of_sites,
    run_alike,
    run_once,
    run_shorter,
)
from pyro_lightning.growth import check_latents_of_no_plate, check_totals
from pyro_lightning.guides import cut_plates, refuse_local_latents, row_plates
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.indexed_params import warn_of_indexed
from pyro_lightning.layout import shapes_of
from pyro_lightning.learning_rate import set_learning_rate
from pyro_lightning.loader_lists import each_loader
from pyro_lightning.masked_latents import find_masked
from pyro_lightning.params import complete_contexts
from pyro_lightning.placed_params import check_places
from pyro_lightning.posterior import sites_of_data
from pyro_lightning.rank_zero import first_rank_logs
from pyro_lightning.ranks import (
    callbacks_of_ranks,
    check_callbacks,
    compare_ranks,
    failing_together,
)
from pyro_lightning.retold import telling
from pyro_lightning.row_optim import rowwise
from pyro_lightning.row_params import check_param_growth
from pyro_lightning.rows import RowSource, data_of, row_source
from pyro_lightning.runs import STATE_N, Runs
from pyro_lightning.saved_sites import latent_shapes
from pyro_lightning.shapes import check_broadcast, check_square
from pyro_lightning.sizes import cut_sizes, dataset_size_of, mean_batch_size, refuse_no_batch
from pyro_lightning.states import drawing_in_python, preserved_state
from pyro_lightning.strategies import refuse_sharded
from pyro_lightning.streams import check_shares, resume_once
from pyro_lightning.structure import check_guide_sites, explained_scales
from pyro_lightning.uneven import RowsOfRanks

# What Lightning ignores of a scheduler, with a warning, where optimization is manual.
_OURS = ("reduce_on_plateau", "monitor", "strict")


class LifeCycle(Runs):
    """What a ``PyroSVIModule`` does before its first step."""

    _optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    _lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None
    _given_size: int | None
    _checks: bool
    steps_per_batch: int = 1
    _watched: Mapping[str, Any] = MappingProxyType({})
    _rows_per_step: int | None = None
    _mean_batch_size: float | None = None
    _followed: Any = None
    _rows_of_ranks: RowsOfRanks = RowsOfRanks()
    _globals_of_data: tuple[str, ...] = ()
    _indexed: tuple[str, ...] = ()
    _checked_rows: int = 0
    _prototype: Any = None
    _draws_in_python: bool = False
    _few_rows: FewRows = FewRows(None)
    _sites: Mapping[str, Sequence[int]] = MappingProxyType({})
    _cut_plates: tuple[str, ...] = ()
    _first_dtype: torch.dtype = torch.float32
    _known_shapes: frozenset[Any] = frozenset()

    # -- before the first step -----------------------------------------------------------------
    def _initialise(self, batch: Any) -> None:
        """Make every parameter and check model and guide, on one batch; leave all else as it was.

        Outside inference mode, whose tensors cannot train; the guide's prototype without
        gradients, so that what it remembers can be copied.
        """
        self._initialised = False
        self._find_networks()
        with torch.inference_mode(False), preserved_state(self), self._isolated() as handled:
            batch = map_tensors(batch, lambda t: t.clone() if t.is_inference() else t)
            batch = self._with_rows(batch)
            drew = drawing_in_python()
            complete_contexts(partial(self._warm_up, batch, handled))
            self._draws_in_python = drew()
        data = data_of(batch)
        counted = type(self).num_rows is LifeCycle.num_rows
        self._few_rows = keep_few_rows(self, data, counted)
        self._prototype = self._few_rows.repeated(self._few_rows.shown)
        self._first_dtype = torch.get_default_dtype()
        self._checked_rows = self.num_rows(data)
        self._known_shapes = frozenset([shapes_of(data, self._checked_rows)])
        self._keeps_rows = bool(self._per_row())
        self._initialised = True

    def _warm_up(self, batch: Any, handled: Callable[[Any], Callable[..., Any]]) -> None:
        self._check_rows_of_guide()
        in_model, in_guide = run_once(self, batch, handled)
        # Only a batch whose rows are counted by us can be cut.
        counted = type(self).num_rows is LifeCycle.num_rows
        shorter = partial(run_shorter, self, batch, handled) if counted else None
        plates = cut_plates(in_model) if in_model.plates else row_plates(in_model, shorter)
        self._cut_plates = tuple(sorted(plates))
        self._sites = latent_shapes(in_guide.sites, plates)
        tables = self._tables()
        served = {table.site for table in tables}
        self._sites_of_data = sites_of_data(in_guide.sites, plates, served)
        self._globals_of_data = globals_of_data(self, batch, handled, in_guide.sites)
        self._dims_by_hand = rows_of_sites(self, batch, handled, in_guide.sites) if counted else {}
        if self._checks:
            in_rows = {(table.site, table.plate) for table in tables}
            refuse_local_latents(self.guide, in_guide.sites, plates, in_rows)
            check_sites(in_model, in_guide, self.elbo, plates, shorter)
            warn_of_unmet(in_model, in_guide)
            if not in_model.plates and not in_model.scale_sites:
                warn_of_unscaled(in_model, plates, self._known_size())
            if counted and in_model.batch_size > 1:
                self._check_growth(batch, handled, in_model, plates)
            self._check_params(batch, handled, in_model, in_guide, plates, counted)
        sites = in_model.sites, in_guide.sites
        self._masks = find_masked(self, batch, handled, *sites, self._checks)
        explained = explained_scales(in_model.sites, in_guide.sites, self.elbo, plates)
        with torch.enable_grad(), explained:
            loss = self._networks.settled(in_model.sites, lambda: self._run(batch).loss)
            check_leaves(loss, self)
        self._indexed = indexed_by_data(self, batch) if self._checks and counted else ()

    def _check_growth(
        self,
        batch: Any,
        handled: Callable[[Any], Callable[..., Any]],
        in_model: DataPlateMessenger,
        plates: set[str],
    ) -> None:
        sites, rows = in_model.sites, in_model.batch_size
        over_rows = plates.difference(self._columns)
        alike = partial(run_alike, self, batch, handled, sites, over_rows)
        if in_model.scaled_observations:
            names = set(in_model.plates).union(plates)
            check_totals(sites, names, in_model.scale_sites, rows, alike)
        elif not (in_model.plates or in_model.scale_sites):
            check_latents_of_no_plate(self.guide, sites, plates, rows, alike)

    def _check_params(
        self,
        batch: Any,
        handled: Callable[[Any], Callable[..., Any]],
        in_model: DataPlateMessenger,
        in_guide: DataPlateMessenger,
        plates: set[str],
        counted: bool,
    ) -> None:
        params = [*in_model.params, *in_guide.params]
        of_rows = {param.site for param in self._pyro_param_store.row_params()}
        rows, sites = in_model.batch_size, (in_model.sites, in_guide.sites)
        if counted and rows > 1:
            run = partial(params_of_shorter, self, batch, handled)
            check_param_growth(params, in_model.sites + in_guide.sites, of_rows, rows, run)
            check_places(self, batch, handled, sites, plates.difference(self._columns))

    def _settle_masks(self, batch: Any) -> None:
        """Decide about masks that left nothing out before, on the first batch where they do."""
        with preserved_state(self), self._isolated() as handled:
            in_model, in_guide = run_once(self, batch, handled)
            sites = in_model.sites, in_guide.sites
            self._masks = {**self._masks, **find_masked(self, batch, handled, *sites, self._checks)}

    def configure_callbacks(self) -> list[Callback]:
        """Add what several processes need; a subclass's own hook adds to this list."""
        return callbacks_of_ranks(self.trainer)

    def _check_shapes(self, batch: Any) -> None:
        """Check a batch that may broadcast otherwise than those before, or lacks a field of theirs.

        Raises:
            ValueError: Naming the site.
        """
        data = data_of(batch)
        if self._checks:
            with preserved_state(self), self._isolated() as handled:
                batch = self._with_rows(data)
                in_model, in_guide = run_once(self, batch, handled)
                plates, rows = set(self._cut_plates), in_model.batch_size
                # What a batch lacks is a latent of the model, which the guide may not draw.
                check_guide_sites(in_model.sites, in_guide.sites, self.elbo)
                check_broadcast(in_model.sites, plates, self._scale_sites)
                check_broadcast(in_guide.sites, plates)
                if type(self).num_rows is LifeCycle.num_rows and rows > 1:
                    shorter = partial(run_shorter, self, batch, handled)
                    check_square(in_model.sites, plates, rows, shorter)
        self._known_shapes |= {shapes_of(data, self.num_rows(data))}

    def setup(self, stage: str) -> None:
        """Read N and make lazy parameters, before optimizer, DDP and checkpoint need them."""
        refuse_sharded(self.trainer.strategy)
        check_callbacks(self.trainer)
        if stage == "predict":
            return
        training = stage == "fit"
        if not training and self._dataset_size is None and not self._size_is_stated():
            return  # a checkpoint may know it, which is read after this
        with failing_together(self.trainer), first_rank_logs():
            loader, source = self._read_data(stage)
            # What was rebuilt of a checkpoint is checked before it trains.
            ready = self._initialised and bool(self._checked_rows or not training)
            if not ready and loader is not None:
                with preserved_state(self):
                    batch = self._first_batch(loader)
                # A step makes its tensors in the precision of the Trainer, and so does this run.
                with self.trainer.precision_plugin.tensor_init_context():
                    self._initialise(batch)
                copy_again(self.trainer, self, stage)
        if training:
            compare_ranks(self, loader)
            with failing_together(self.trainer):
                self._number_rows(source)

    def _read_data(self, stage: str) -> tuple[Any, RowSource | None]:
        """Ask for the loader of a stage; read N, and which rows have a number."""
        training, source = stage == "fit", None
        with preserved_state(self):  # a user's hook or data set may draw random numbers
            loader = stage_loader(self.trainer, stage)
            if training:
                check_shares(loader, self.trainer.world_size, self.trainer.global_rank)
                refuse_no_batch(loader)
            if training or self._dataset_size is None:
                self._dataset_size = self._resolve_size(loader if training else None)
            if not training:
                loader = next(each_loader(loader), None)
        if training:
            self._mean_batch_size = self._followed = None
            self._rows_of_ranks = RowsOfRanks()
            source = row_source(loader)
            self._identities = source.identities if source else None
        elif self._identities is None:
            evaluated = row_source(loader)  # its rows may be a part of those that have a number
            known = evaluated and evaluated.dataset.row_numbers and evaluated.identities
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            self._identities = known or getattr(datamodule, "identities", None)
        return loader, source

    def on_validation_start(self) -> None:
        """Refuse to validate without N."""
        if self._dataset_size is None:
            self._resolve_size(None)

    def on_test_start(self) -> None:
        """Refuse to test without N."""
        if self._dataset_size is None:
            self._resolve_size(None)

    def _size_is_stated(self) -> bool:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        stated = self._given_size, getattr(datamodule, "dataset_size", None)
        return any(size is not None for size in stated)

    def _follow_loader(self, batch: Any) -> None:
        """Read the mean batch size of the loader that trains, and N anew once it is another.

        Known from the first step only: Lightning gives the loader its sampler after set-up, and may
        reload it in any epoch.
        """
        loader, count = self.trainer.train_dataloader, self.trainer.num_training_batches
        mean = mean_batch_size(loader, count)
        if self._followed == (id(loader), count, mean):
            return
        resume_once(loader)
        if self._followed is not None:
            self._dataset_size = self._resolve_size(loader)
        self._followed = id(loader), count, mean
        rows = self.num_rows(data_of(batch))
        if self.steps_per_batch > 1:
            self._rows_per_step, mean = cut_sizes(loader, count, rows, self.steps_per_batch)
        # Of a stream of unknown length the first batch is taken for the usual size, so that a
        # smaller one weighs less; the constant factor that is left moves no optimum.
        of_ranks = self._rows_of_ranks
        if mean is not None and of_ranks.mean is not None:
            # All take as many steps as the rank with most rows, which is no rank's own number.
            split = self._rows_per_step if self.steps_per_batch > 1 else None
            mean = of_ranks.mean / (math.ceil(of_ranks.most / split) if split else count)
        self._mean_batch_size = float(self._rows_per_step or rows) if mean is None else mean

    def _resolve_size(self, loader: Any) -> int:
        if self._given_size is not None:
            return self._given_size
        stated = getattr(self.trainer.datamodule, "dataset_size", None)  # type: ignore[attr-defined]
        if stated is not None:
            return read_count(stated, "dataset_size of the datamodule")
        if loader is None:
            raise ValueError(
                "N, the number of training observations, is not known, and is never taken from "
                f"validation or test data. Fit first, or state it: {STATE_N}."
            )
        return dataset_size_of(unshared(loader))

    def _first_batch(self, loader: Any, start: int = 0) -> Any:
        # Lightning converts the module after set-up; the parameters to be made need it before.
        self.trainer.precision_plugin.convert_module(self)
        with torch.inference_mode(False):
            batch = example_batch(loader, start)
            return transferred(self, batch, self._parameter_device() or torch.device("cpu"))

    def configure_optimizers(self) -> Any:
        """Call ``optimizer`` with all parameters, and ``lr_scheduler`` with the optimizer.

        A ``ReduceLROnPlateau`` watches ``train_loss``; return Lightning's dict to say otherwise.
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
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler = {"scheduler": scheduler, "monitor": "train_loss"}
        if self.steps_per_batch > 1 and isinstance(scheduler, Mapping):
            self._watched = {key: scheduler[key] for key in _OURS if key in scheduler}
            scheduler = {key: item for key, item in scheduler.items() if key not in _OURS}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}
