"""Lightning's side of checkpoints: what is stored beside the weights, and a module made of it."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pyro_lightning._lightning import restricted_classmethod, resumes_fit, stage_of
from pyro_lightning.arguments import read_flag, read_map_location, read_path
from pyro_lightning.batches import map_tensors
from pyro_lightning.checkpoint_io import (
    is_checked_as_written,
    use_safe_files,
    verify_local_file,
)
from pyro_lightning.few_rows import FewRows
from pyro_lightning.first_run import run_once
from pyro_lightning.formats import KEY, VERSION, blank, pack, stored_in, unpack
from pyro_lightning.layout import shapes_of
from pyro_lightning.other_fits import refuse_other_data, refuse_other_plates
from pyro_lightning.params import complete_contexts
from pyro_lightning.rank_zero import warn
from pyro_lightning.saved_sites import (
    latent_shapes,
)
from pyro_lightning.state_dicts import BY_HAND, StateDicts
from pyro_lightning.states import default_dtype, preserved_state
from pyro_lightning.weights_only import refuse_code

if TYPE_CHECKING:
    from typing_extensions import Self


class Checkpoints(StateDicts):
    """Stores what rebuilds a guide, and refuses checkpoints of something else."""

    _save_example: bool = True
    _unusable: float

    # -- saving --------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Set up; refuse hyperparameters that no checkpoint could hold before they cost a fit."""
        use_safe_files(self.trainer)
        if stage == "fit":
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            saved = {self.CHECKPOINT_HYPER_PARAMS_KEY: dict(self.hparams)}
            if data is not None:
                saved[data.CHECKPOINT_HYPER_PARAMS_KEY] = dict(data.hparams)
            refuse_code(saved)
        super().setup(stage)
        if stage == "fit" and self._save_example:
            _, problem = self._packed_example()
            if problem is not None:
                warn(
                    f"checkpoints will hold no example batch, from which load_from_checkpoint "
                    f"would rebuild the guide: {problem}. Let the loader hand over tensors, "
                    "numbers and strings, in tuples, lists and dicts, and make the object in "
                    "model_inputs; or leave the example out by save_example=False.",
                    stacklevel=2,
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what rebuilds the guide, the sizes of the data, and K.

        Raises:
            TypeError: When ``torch.load(weights_only=True)`` could not read the checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = self._to_store()
        if not is_checked_as_written(self._trainer):
            refuse_code(checkpoint)

    def _to_store(self) -> dict[str, Any]:
        example, problem = self._packed_example()
        by_row = bool(self._per_row())
        return {
            "version": VERSION,
            "dataset_size": self._dataset_size,
            "unusable": self._unusable,
            "plates": self._row_plates(),
            "columns": {name: self._data_plates[name] for name in self._columns},
            "identities": self._count_rows() if by_row else None,
            "trained": self._trained.clone() if by_row and self._trained is not None else None,
            "steps_per_batch": self.steps_per_batch,
            "example": example,
            "no_example": problem,
            "shown_rows": self._few_rows.shown,
            "built_rows": self._few_rows.built,
            "structure": self._structure() if self._initialised else None,
        }

    def _packed_example(self) -> tuple[Any, str | None]:
        """The example batch, or why there is none."""
        if not self._initialised:
            return None, "it was written before the first batch"
        try:
            packed = pack(self._few_rows.data)
        except TypeError as error:
            return None, f"{error}, which weights_only would not read back"
        return (packed if self._save_example else blank(packed)), None

    def _structure(self) -> dict[str, Any]:
        """What the first batch decided, on rows of which the checkpoint has two at most."""
        return {
            "dtype": self._first_dtype,
            "sites": self._sites,
            "cut_plates": list(self._cut_plates),
            "sites_of_data": list(self._sites_of_data),
            "globals_of_data": list(self._globals_of_data),
            "dims_by_hand": dict(self._dims_by_hand),
            "masks": dict(self._masks),
            "lifted": sorted(self._networks.released),
            "max_plate_nesting": getattr(self.elbo, "max_plate_nesting", float("inf")),
        }

    # -- loading -------------------------------------------------------------------------------

    @restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> "Self":
        """Make a module of a checkpoint, whose guide gives samples at once.

        Of ``PyroSVIModule`` itself, or a subclass that does not save its arguments, hand over what
        the fit had: ``load_from_checkpoint(path, model=model, guide=guide)``.

        Args:
            checkpoint_path: Path, URL or open file.
            map_location: Where tensors are put, as in ``torch.load``.
            hparams_file: As in Lightning.
            strict: As in Lightning: whether sites and parameters must be the same.
            weights_only: False runs the code that a checkpoint holds; a file that holds any is
                refused by default, from the web, too. Only with False are arguments made that
                a checkpoint of ``LightningCLI`` describes, by classes and functions to import.
            **kwargs: Arguments of the class.

        Returns:
            A module on the device of the checkpoint's tensors, in training mode.

        Raises:
            ValueError: For a newer format, or other data plates.
            RuntimeError: For a checkpoint of another model or guide, or one without an example
                batch.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from lightning.pytorch import Trainer
            >>> from pyro_lightning import ArrayDataModule, PyroSVIModule
            >>> def model(x):
            ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
            >>> trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False,
            ...     enable_checkpointing=False, enable_progress_bar=False,
            ...     enable_model_summary=False)
            >>> trainer.fit(PyroSVIModule(model), datamodule=ArrayDataModule(torch.zeros(9)))
            >>> folder = getfixture("tmp_path")
            >>> trainer.save_checkpoint(folder / "fit.ckpt")
            >>> svi = PyroSVIModule.load_from_checkpoint(folder / "fit.ckpt", model=model)
            >>> svi.posterior_samples(5)["mu"].shape, svi.dataset_size
            (torch.Size([5]), 9)
        """
        verify_local_file(read_path(checkpoint_path, "checkpoint_path"))
        safe = weights_only is None or read_flag(weights_only, "weights_only")
        read_map_location(map_location)
        if hparams_file is not None:
            read_path(hparams_file, "hparams_file")
        if strict is not None:
            read_flag(strict, "strict")
        if safe:
            # A name in a file, which has Lightning import and call what the arguments there say.
            kwargs["_instantiator"] = None
        loaded: Self = super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, safe, **kwargs
        )
        return loaded

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the guide's parameters, where they do not exist yet; read sizes and rows.

        Raises:
            ValueError: For a newer format, other data plates, or a fit that would go on with data
                of another size or another ``steps_per_batch``.
            RuntimeError: When the model does not run on the example batch.
        """
        super().on_load_checkpoint(checkpoint)
        stored = stored_in(checkpoint)
        if stored is None:
            return
        refuse_other_plates(self, stored)
        if resumes_fit(self):
            refuse_other_data(self, stored)
        self._stored = stored
        if self._given_size is None and stored["dataset_size"] is not None:
            self._dataset_size = stored["dataset_size"]
        self._unusable = stored["unusable"]
        if stored["trained"] is not None:
            self._trained = stored["trained"].cpu().clone()
        if stored["identities"] is not None:
            self._identities = stored["identities"]
        if self._initialised:
            return
        if stored["example"] is not None:
            self._rebuild(stored, checkpoint["state_dict"])
        elif (stage := stage_of(self)) is not None:
            super().setup(stage)

    def _rebuild(self, stored: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Run guide and model once on the example batch, so that all parameters exist.

        Nothing is checked and no loss is taken: two rows may be too few, and the batch that the
        model was checked on was accepted. A training batch is checked again.
        """
        structure = stored["structure"]
        few = FewRows(unpack(stored["example"]), stored["shown_rows"], stored["built_rows"])
        device = self._parameter_device() or torch.device("cpu")
        batch = map_tensors(few.repeated(few.built), lambda tensor: tensor.to(device))
        # In the precision of the first batch, and afterwards in that of the checkpoint.
        _match_dtypes_(self, state, structure["dtype"])
        self._find_networks()
        self._networks.release(structure["lifted"])
        try:
            with (
                torch.inference_mode(False),
                preserved_state(self),
                default_dtype(structure["dtype"]),
                pyro.validation_enabled(False),
                self._isolated() as handled,
            ):
                run = partial(run_once, self, self._with_rows(batch), handled)
                _, in_guide = complete_contexts(run)
        except Exception as error:
            sites = ", ".join(structure["sites"]) or "none"
            raise RuntimeError(
                "the guide could not be rebuilt: model and guide do not run on the example batch "
                f"of the checkpoint ({type(error).__name__}: {error}). Hand over the model and "
                f"guide that were trained (latent sites: {sites}). If these are the same, they "
                f"need another batch than the checkpoint has. {BY_HAND}"
            ) from error
        _match_dtypes_(self, state)
        if getattr(self.elbo, "max_plate_nesting", None) == float("inf"):
            # Which Pyro finds by a run of its own, with random numbers that others would have had.
            self.elbo.max_plate_nesting = structure["max_plate_nesting"]
        self._first_dtype, self._cut_plates = structure["dtype"], tuple(structure["cut_plates"])
        self._sites = latent_shapes(in_guide.sites, self._cut_plates)
        self._sites_of_data = tuple(structure["sites_of_data"])
        self._globals_of_data = tuple(structure["globals_of_data"])
        self._dims_by_hand, self._masks = structure["dims_by_hand"], structure["masks"]
        self._few_rows, self._prototype, self._checked_rows = few, few.repeated(few.shown), 0
        self._known_shapes = frozenset([shapes_of(batch, self.num_rows(batch))])
        self._keeps_rows = bool(self._per_row())
        self._initialised = True


def _match_dtypes_(
    module: nn.Module, state: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Give parameters and buffers that were saved in another precision that one, or the given.

    A Trainer of double precision makes a module double, which a new one is not.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        there = state.get(name)
        if not isinstance(there, torch.Tensor) or is_lazy(tensor) or is_lazy(there):
            continue
        real = there.is_floating_point() and tensor.is_floating_point()
        if real and there.dtype != tensor.dtype:
            tensor.data = tensor.data.to(dtype or there.dtype)
