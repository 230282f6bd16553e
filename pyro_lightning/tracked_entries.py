"""The entries of parameters that are tracked over a fit, with their units."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from pyro_lightning.guide_units import units_of_parameters


class TrackedEntries:
    """A few entries of parameters, evenly spread if there are more.

    Args:
        parameters: By name.
        most: How many entries at most.

    Attributes:
        places: Which entries of a parameter, flat, by its name.

    Example:
        >>> tracked = TrackedEntries({"w": torch.arange(3.0), "b": torch.tensor(7.0)}, most=2)
        >>> tracked.values()
        tensor([0., 2.])
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], most: int) -> None:
        total = sum(parameter.numel() for parameter in parameters.values())
        count = min(total, most)
        # In whole numbers: those of torch.linspace are not exact beyond 2^24 entries.
        numbers = torch.arange(count) * total // max(count, 1)
        self.places: dict[str, torch.Tensor] = {}
        self._parameters, start = parameters, 0
        for name, parameter in parameters.items():
            inside = (numbers >= start) & (numbers < start + parameter.numel())
            if inside.any():
                self.places[name] = (numbers[inside] - start).to(parameter.device)
            start += parameter.numel()

    def __len__(self) -> int:
        return sum(map(len, self.places.values()))

    def values(self) -> torch.Tensor:
        """Read the entries, ``(entries,)``, in float32."""
        flat = {name: self._parameters[name].detach().reshape(-1) for name in self.places}
        return torch.cat([flat[name][places].float() for name, places in self.places.items()])

    def units(self, guide: Any) -> torch.Tensor:
        """Return the unit of each entry in a guide; NaN for one that has none."""
        known, units = units_of_parameters(guide), []
        for name, places in self.places.items():
            unit = known.get(id(self._parameters[name]))
            none = torch.full((len(places),), math.nan)
            units.append(none if unit is None else unit.reshape(-1)[places].cpu())
        return torch.cat(units).double()
