"""Loading parameters and buffers: what would be lost, or is of something else, is an error."""

from collections.abc import Mapping
from typing import Any

from pyro.infer.autoguide import AutoContinuous

from pyro_lightning.guides import parts_of
from pyro_lightning.saved_sites import (
    lines_of_keys,
    other_parameters,
    other_sites,
    parameter_name,
)
from pyro_lightning.steps import ManySteps

BY_HAND = (
    "Build the module as for the fit, checkpoint = torch.load(path, weights_only=True), and then "
    "svi.on_load_checkpoint(checkpoint), svi.loss(batch) and "
    "svi.load_state_dict(checkpoint['state_dict'])."
)
_MADE_LATER = ("guide.", "_pyro_param_store.", "_networks.")


class StateDicts(ManySteps):
    """Loads a ``state_dict`` of the same model and guide, and refuses another."""

    def __init__(self) -> None:
        super().__init__()
        # What a checkpoint holds beside the weights that are loaded next.
        self._stored: dict[str, Any] | None = None

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters and buffers; after :meth:`on_load_checkpoint` of the same checkpoint.

        Args:
            state_dict: As :meth:`state_dict` returned it.
            strict: Whether what only one of the two has is an error. What a guide without
                parameters would lose is an error in any case.
            assign: As in ``nn.Module.load_state_dict``.

        Returns:
            What is missing and what is unexpected.

        Raises:
            RuntimeError: Listing latent sites and parameters that are missing (in the checkpoint),
                unexpected (of the checkpoint alone) or of another shape.
        """
        stored, self._stored = self._stored, None
        if not self._initialised:
            self._refuse_lost(state_dict, stored)
        lines, ordered = [], False
        if stored is not None and stored["structure"] is not None and self._initialised:
            ordered = any(isinstance(part, AutoContinuous) for part in parts_of(self.guide))
            lines = other_sites(stored["structure"]["sites"], self._sites, ordered)
        # What one vector holds of other sites fits by chance.
        if lines and (strict or ordered):
            raise _another([*lines, *other_parameters(state_dict, self.state_dict())])
        try:
            # Without strict, so that torch, which knows the hooks of all parts, says what differs.
            found: Any = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:
            lines = other_parameters(state_dict, self.state_dict())
            if not lines:
                raise
            raise _another(lines) from error
        if strict and (found.missing_keys or found.unexpected_keys):
            raise _another(lines_of_keys(found.missing_keys, found.unexpected_keys))
        return found

    def _refuse_lost(self, state: Mapping[str, Any], stored: Mapping[str, Any] | None) -> None:
        """Refuse parameters for which the guide has no place yet, as torch would drop them."""
        own = self.state_dict().keys()
        lost = [key for key in state if key not in own and key.startswith(_MADE_LATER)]
        if not lost:
            return
        why = ""
        if stored is not None:
            why = f" The checkpoint holds no example batch to make them: {stored['no_example']}."
        raise RuntimeError(
            "the guide has no parameters yet, and these of the checkpoint would be lost: "
            f"{', '.join(map(parameter_name, lost))}.{why} Use load_from_checkpoint, which makes "
            "them of the checkpoint's example batch (an on_load_checkpoint or on_save_checkpoint "
            f"of your own must call super()). Or make them first. {BY_HAND}"
        )


def _another(lines: list[str]) -> RuntimeError:
    return RuntimeError(
        "the checkpoint is of another model or guide than this module (missing is what the "
        "checkpoint lacks, unexpected what this module lacks):\n  "
        + "\n  ".join(lines)
        + "\nHand over the model and guide that were trained, as in load_from_checkpoint(path, "
        "model=..., guide=...). strict=False loads what both have."
    )
