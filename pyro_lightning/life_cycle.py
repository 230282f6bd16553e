"""How a module comes to its parameters, and is checked, before its first step."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import Callback

from pyro_lightning._lightning import transferred
from pyro_lightning.averages import copy_again
from pyro_lightning.batches import example_batch, map_tensors
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
from pyro_lightning.layout import shapes_of
from pyro_lightning.masked_latents import find_masked
from pyro_lightning.optimizers import Optimizers
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
from pyro_lightning.row_params import check_param_growth
from pyro_lightning.rows import data_of
from pyro_lightning.saved_sites import latent_shapes
from pyro_lightning.shapes import check_broadcast, check_square
from pyro_lightning.states import drawing_in_python, preserved_state
from pyro_lightning.strategies import refuse_sharded
from pyro_lightning.structure import check_guide_sites, explained_scales


class LifeCycle(Optimizers):
    """What a ``PyroSVIModule`` does before its first step."""

    _checks: bool
    _globals_of_data: tuple[str, ...] = ()
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
        run = partial(run_shorter, self, batch, handled, in_model.sites)
        shorter = cache(run) if counted else None  # one run for all checks that ask for it
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
                    shorter = partial(run_shorter, self, batch, handled, in_model.sites)
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

    def _first_batch(self, loader: Any, start: int = 0) -> Any:
        # Lightning converts the module after set-up; the parameters to be made need it before.
        self.trainer.precision_plugin.convert_module(self)
        with torch.inference_mode(False):
            batch = example_batch(loader, start)
            return transferred(self, batch, self._parameter_device() or torch.device("cpu"))
