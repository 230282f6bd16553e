"""How a module runs model and guide on a batch."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from pyro.infer import ELBO, EnergyDistance

from pyro_lightning.baselines import DecayingBaselines
from pyro_lightning.batches import batch_arguments, count_rows
from pyro_lightning.elbo import Estimate, estimate_elbo, run_elbo
from pyro_lightning.guards import Guard, find_guards
from pyro_lightning.guides import drop_weak_references_
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.held_out import PriorMessenger, without_sites
from pyro_lightning.kl_weight import KLWeight
from pyro_lightning.masked_latents import KEPT, open_masks
from pyro_lightning.masks import CarriedMasks
from pyro_lightning.names import Names, defined_by_user, names_of_libraries, names_read
from pyro_lightning.owner import ModelOwner
from pyro_lightning.row_hooks import RowHooks
from pyro_lightning.rows import data_of
from pyro_lightning.skipped import size_without

STATE_N = "PyroSVIModule(..., dataset_size=N), or an attribute dataset_size of the datamodule"


class Runs(RowHooks, KLWeight, ModelOwner):
    """Runs model and guide on a batch, with the scale where it belongs and parameters its own."""

    elbo: ELBO | EnergyDistance
    _baselines: DecayingBaselines | None
    _scale_sites: tuple[str, ...]
    _dataset_size: int | None
    _unusable: float = 0.0  # share of the rows that cannot train
    _makes_handler: Callable[..., DataPlateMessenger] = DataPlateMessenger
    _masks: Mapping[str, str] = MappingProxyType({})
    _initialised: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # Lightning's does not call Pyro's, which comes after it and does this for parameters.
        drop_weak_references_(self)
        return super().__getstate__()

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
        """N, the number of observations in the training set; None until it is known.

        Rows that cannot train, of batches that were skipped, are not counted.
        """
        return None if self._dataset_size is None else self._known_size()

    def _known_size(self) -> int:
        return size_without(self._whole_size(), self._unusable)

    def _whole_size(self) -> int:
        """N, with the rows that cannot train."""
        if self._dataset_size is None:
            raise RuntimeError(
                f"N, the number of training observations, is not known yet. State it: {STATE_N}."
            )
        return self._dataset_size

    # -- one run -------------------------------------------------------------------------------

    def _handler(self, batch_size: int) -> Callable[[], DataPlateMessenger]:
        """Make what scales model and guide, for a batch."""
        size, whole = self._known_size(), self._whole_size()
        plates = {
            name: stated if stated and name in self._columns else size
            for name, stated in self._data_plates.items()
        }
        sites = dict.fromkeys(self._scale_sites, size)
        others = () if size == whole else (whole,)
        return partial(self._makes_handler, plates, batch_size, sites, self._columns, *others)

    def _run(self, batch: Any, held_out: bool = False) -> Estimate:
        data = data_of(batch)
        rows = self.num_rows(data)
        args, kwargs = self.model_inputs(data)
        with self._isolated() as handled, self._rows_of(batch, rows, held_out) as unseen:
            model, guide = handled(self.model), handled(self.guide)
            if unseen:
                model, guide = PriorMessenger(unseen)(model), without_sites(guide, unseen)
            model, guide = self._masked(model, guide)
            if not held_out:
                model, guide = self._weighed(model, guide)
            # The first run only checks, and leaves them as they are.
            baselines = self._baselines if self._initialised else None
            handler = self._handler(rows)
            found = estimate_elbo(self.elbo, model, guide, args, kwargs, handler, baselines)
        if open_masks(self._masks, found.model_sites, found.guide_sites) and not held_out:
            self._settle_masks(batch)
        return found

    def _masked(
        self, model: Callable[..., Any], guide: Callable[..., Any]
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        carried = (name for name, state in self._masks.items() if state != KEPT)
        return CarriedMasks(carried).around(model, guide)

    def _settle_masks(self, batch: Any) -> None:
        raise NotImplementedError

    def _bare_loss(self, args: Any, kwargs: Any, batch_size: int) -> torch.Tensor:
        """Compute the loss from a batch's arguments alone, for a trace of it."""
        with self._isolated() as handled, self._taken_rows(batch_size):
            model, guide = self._masked(handled(self.model), handled(self.guide))
            model, guide = self._weighed(model, guide)
            handler = self._handler(batch_size)
            return run_elbo(self.elbo, model, guide, args, kwargs, handler)[0]

    # -- what a trace takes for constant ---------------------------------------------------------

    _names_of_library: frozenset[str] = frozenset()

    def _guards(self) -> list[Guard]:
        """List the Python state that model, guide and ELBO read, with its values."""
        names = names_read(self, [self.model, self.guide])
        found = find_guards([self.model, self.guide, self.elbo], self._hides(names))
        for holder in (self.__dict__, self._modules):
            for key in {"elbo", "_model", "_guide", "model", "guide"}.intersection(holder):
                found.append(Guard(key.lstrip("_"), holder.get, key, holder.get(key)))
        # The Trainer's counts where model or guide reads them, as to anneal a term.
        epoch = {"trainer", "_trainer", "current_epoch"}.intersection(names.read)
        for name in ["current_epoch"] * bool(epoch) + ["global_step"] * names.has("global_step"):
            found.append(Guard(name, partial(getattr, self), name, getattr(self, name)))
        for name in sorted(names.looked_up.difference(self.__dict__, dir(type(self)))):
            found.append(Guard(name, self.__dict__.get, name, None))
        return found

    def _hides(self, names: Names) -> Callable[[Any, str], bool]:
        """Tell which attributes of this module are no state of model and guide.

        Lightning and this library keep theirs here as well, and a user's hooks count steps.
        """
        library = self._names_of_library | names_of_libraries(type(self))  # type: ignore[arg-type]

        def hides(holder: Any, name: str) -> bool:
            if holder is not self:
                return False
            if name in ("training", "_hparams"):  # `hparams` is a property of Lightning's
                return False
            if name in ("__dict__", "_ddp_params_and_buffers_to_ignore"):
                return True
            if name in library:
                return not (names.has(name) and defined_by_user(self, name))
            return not names.computed and not names.has(name)

        return hides
