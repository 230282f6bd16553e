"""Coming back from a fit in processes that were started from this one: ``ddp_spawn``, ``ddp_fork``.

Their launcher hands back ``state_dict()`` alone, and loads it with ``strict=False`` where the
guide may have no parameters yet.
"""

from collections.abc import Mapping
from typing import Any

from pyro_lightning._lightning import ends_in_child, loses_new_parameters
from pyro_lightning.checkpoints import Checkpoints
from pyro_lightning.formats import KEY


class Spawned(Checkpoints):
    """Brings back from processes what a checkpoint would have: guide, N, rows that trained."""

    def setup(self, stage: str) -> None:
        """Set up; refuse a fit whose guide could not be rebuilt in the process that called it.

        Raises:
            ValueError: When no example of the batch can be handed back.
        """
        made = self._initialised
        super().setup(stage)
        if stage != "fit" or made or not loses_new_parameters(self.trainer):
            return
        problem = self._packed_example()[1]
        if problem is not None:
            raise ValueError(
                "this strategy trains in processes started from this one and loads their result "
                "back here, where the guide has no parameters yet to hold it, and no example batch "
                f"can come back to make them: {problem}. Call svi.loss(batch) once before the fit, "
                "with dataset_size given; or use strategy='ddp'."
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return parameters and buffers; to the process that called the fit, all that it lacks."""
        state: Any = super().state_dict(*args, **kwargs)
        if ends_in_child(self):
            state[KEY] = self._to_store()
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load parameters and buffers; see :meth:`StateDicts.load_state_dict`."""
        if KEY in state_dict:
            weights = {name: value for name, value in state_dict.items() if name != KEY}
            # Not the hook of a subclass, which looks for what it has saved itself.
            Checkpoints.on_load_checkpoint(self, {KEY: state_dict[KEY], "state_dict": weights})
            state_dict = weights
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
