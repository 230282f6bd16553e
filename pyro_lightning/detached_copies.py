"""Copies of what a module remembers of its last run."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class DetachedCopies(TorchFunctionMode):
    """Lets ``copy.deepcopy`` copy tensors that a run has computed, without their gradients.

    Pyro's flows keep the values of their last call, with the graph that made them, and a tensor in
    a graph refuses to be copied.

    Example:
        >>> from copy import deepcopy
        >>> computed = torch.ones(1, requires_grad=True) * 2
        >>> with DetachedCopies():
        ...     deepcopy([computed])
        [tensor([2.])]
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Copy a tensor that is no leaf, and leave all else to torch."""
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))
