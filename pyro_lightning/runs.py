"""How a module runs model and guide on a batch."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from pyro.infer import ELBO, EnergyDistance
from torch import nn

from pyro_lightning.baselines import DecayingBaselines
from pyro_lightning.batches import batch_arguments, count_rows
from pyro_lightning.elbo import Estimate, estimate_elbo, run_elbo
from pyro_lightning.guards import Guard, names_read
from pyro_lightning.handlers import DataPlateMessenger
from pyro_lightning.held_out import PriorMessenger, without_sites
from pyro_lightning.masked_latents import KEPT, open_masks
from pyro_lightning.masks import CarriedMasks
from pyro_lightning.owner import ModelOwner
from pyro_lightning.row_hooks import RowHooks
from pyro_lightning.rows import data_of
from pyro_lightning.skipped import size_without

STATE_N = "PyroSVIModule(..., dataset_size=N), or an attribute dataset_size of the datamodule"


class Runs(RowHooks, ModelOwner):
    """Runs model and guide on a batch, with the scale where it belongs and parameters its own."""

    elbo: ELBO | EnergyDistance
    _baselines: DecayingBaselines | None
    _scale_sites: tuple[str, ...]
    _dataset_size: int | None
    _unusable: float = 0.0  # share of the rows that cannot train
    _makes_handler: Callable[..., DataPlateMessenger] = DataPlateMessenger
    _masks: Mapping[str, str] = MappingProxyType({})
    _initialised: bool = False

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
            handler = self._handler(batch_size)
            return run_elbo(self.elbo, model, guide, args, kwargs, handler)[0]

    _names_of_library: frozenset[str] = frozenset()

    def _read_names(self) -> frozenset[str] | None:
        parts = [self.model, self.guide]
        functions = [type(p).forward if isinstance(p, nn.Module) else p for p in parts]
        return names_read(self, functions)

    def _counters(self) -> list[Guard]:
        """Watch the Trainer's counts where model or guide reads them, as to anneal a term."""
        names = self._read_names() or frozenset()
        every = "trainer" in names or "_trainer" in names
        counts = [name for name in ("current_epoch", "global_step") if every or name in names]
        return [Guard(name, partial(getattr, self), name, getattr(self, name)) for name in counts]

    def _hides(self) -> Callable[[Any, str], bool]:
        """Tell which attributes of this module are no state of model and guide.

        Lightning and this library keep theirs here as well, and a user's hooks count steps.
        """
        read = self._read_names()

        def hides(holder: Any, name: str) -> bool:
            if holder is not self:
                return False
            if name == "_ddp_params_and_buffers_to_ignore":
                return True
            if name in ("training", "_hparams"):  # `hparams` is a property of Lightning's
                return False
            return name in self._names_of_library or (read is not None and name not in read)

        return hides
