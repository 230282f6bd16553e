"""The mean of parameters over the steps of a fit, and its exchange with what they are now."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class RunningMean:
    r"""Averages parameters, :math:`\bar\lambda_S = \frac{1}{S} \sum_{s=1}^{S} \lambda_s`.

    Args:
        parameters: By name; they are the first iterate.

    Attributes:
        count: S.
        swapped: Whether the parameters hold the mean now, and this object the iterate.

    Example:
        >>> parameter = nn.Parameter(torch.zeros(1))
        >>> mean = RunningMean({"w": parameter})
        >>> parameter.data += 2.0
        >>> mean.add()
        >>> mean.swap()
        >>> parameter.item()
        1.0
        >>> mean.swap()
        >>> parameter.item()
        2.0
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._other = {name: p.detach().clone() for name, p in parameters.items()}
        self.count = 1
        self.swapped = False

    @torch.no_grad()
    def add(self) -> None:
        """Add an iterate."""
        self.count += 1
        for name, mean in self._other.items():
            mean.lerp_(self._parameters[name], 1 / self.count)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange mean and iterate."""
        for name, other in self._other.items():
            parameter = self._parameters[name]
            held = parameter.clone()
            parameter.copy_(other)
            other.copy_(held)
        self.swapped = not self.swapped

    def means(self) -> dict[str, torch.Tensor]:
        """Return copies of the mean, by name."""
        return self._copies(self.swapped)

    def iterates(self) -> dict[str, torch.Tensor]:
        """Return copies of the iterate, by name."""
        return self._copies(not self.swapped)

    def _copies(self, of_parameters: bool) -> dict[str, torch.Tensor]:
        held: Mapping[str, Any] = self._parameters if of_parameters else self._other
        return {name: each.detach().clone() for name, each in held.items()}

    @torch.no_grad()
    def restore(self, iterates: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint, whose mean the parameters held when this was made."""
        for name, parameter in self._parameters.items():
            parameter.copy_(iterates[name])

    def to_parameters(self) -> None:
        """Move to where the parameters have been moved."""
        for name, parameter in self._parameters.items():
            self._other[name] = self._other[name].to(parameter.device)
