"""Effect handlers that put the mini-batch scale N/B where it belongs."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger


def is_subsample(msg: Any) -> bool:
    """Whether a message is the site by which a plate asks for its rows."""
    # Pyro has no public test for this; its own code compares the class name as well.
    return type(msg["fn"]).__name__ == "_Subsample"


class DataPlateMessenger(Messenger):
    """Multiplies the terms inside the data plate by N/B, once, whatever way the plate is written.

    A site in a data plate gets ``scale = N / B``; a site outside keeps its own. A plate that says
    ``subsample_size=B`` is scaled by Pyro already and is left so, but is given the rows
    ``0 .. B-1`` of the batch, so that it does not draw ``randperm(N)``.

    Args:
        plates: Size N of each data plate, by name.
        batch_size: B, the rows of this batch.

    Raises:
        ValueError: When a data plate has a size that is neither N nor B, or other rows than B.

    Source: Hoffman et al. 2013, "Stochastic variational inference"; Pyro's SVI tutorial, part II.
    """

    def __init__(self, plates: Mapping[str, int], batch_size: int) -> None:
        super().__init__()
        self.plates = dict(plates)
        self.batch_size = batch_size
        self.scaled_observations = 0

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            if msg["name"] in self.plates:
                self._give_rows(msg)
            return
        inside = False
        for frame in msg["cond_indep_stack"]:
            if frame.name not in self.plates:
                continue
            inside = True
            # A frame whose full size exceeds its size was scaled by Pyro's own plate.
            if frame.full_size is None or frame.full_size == frame.size:
                size = frame.size if frame.size > 0 else self.batch_size
                msg["scale"] = msg["scale"] * (self.plates[frame.name] / size)
        if inside and msg["is_observed"] and not msg["infer"].get("_deterministic"):
            self.scaled_observations += 1

    def _give_rows(self, msg: Any) -> None:
        name, size, rows = msg["name"], msg["fn"].size, msg["value"]
        dataset_size, batch_size = self.plates[name], self.batch_size
        asked = msg["fn"].subsample_size
        if rows is not None:
            asked = len(rows)
        elif asked is None:
            asked = size
        if size not in (dataset_size, batch_size) or asked != batch_size:
            raise ValueError(
                f"plate '{name}' has size {size} and holds {asked} rows, but the data set has "
                f"N = {dataset_size} and this batch B = {batch_size} rows. Write "
                f"pyro.plate('{name}', len(x)) with x a tensor of the batch, or "
                f"pyro.plate('{name}', {dataset_size}, subsample_size=len(x))."
            )
        if rows is None:
            msg["value"] = torch.arange(batch_size, device=msg["fn"].device)
