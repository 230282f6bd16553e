"""Parameters that belong to the module, never to Pyro's global store."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import constraints, transform_to


def isolate_(*roots: Any) -> None:
    """Make PyroModules that were built under Pyro's default settings usable with local parameters.

    Pyro gives a PyroModule's context its ``param_state`` only when the setting
    ``module_local_params`` is on as the module is built, and needs it whenever it is on later.
    """
    for root in roots:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, PyroModule) and not hasattr(module._pyro_context, "param_state"):
                module._pyro_context.param_state = {"params": {}, "constraints": {}}


@contextmanager
def local_parameters() -> Iterator[None]:
    """Keep PyroModules from the global parameter store; Pyro's setting is put back afterwards."""
    with pyro.settings.context(module_local_params=True):
        yield


class ParamStoreModule(nn.Module):
    """Holds what ``pyro.param`` statements of a function declare, as ordinary parameters.

    A statement's constraint is kept: the parameter is unconstrained, its value is transformed.
    Names may hold dots, which ``state_dict`` does not allow in one name: they become ``|``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constraints: dict[str, Any] = {}

    def get(self, name: str, init: Any, constraint: Any) -> torch.Tensor:
        """Return the constrained value, making the parameter at its first statement."""
        key = name.replace(".", "|")
        if key not in self._parameters:
            if init is None:
                raise RuntimeError(f"pyro.param('{name}') has no initial value at its first use")
            self._parameters[key] = self._make(init, constraint)
        self._constraints[key] = constraint
        unconstrained = self._parameters[key]
        assert unconstrained is not None
        value: torch.Tensor = transform_to(constraint)(unconstrained)
        # A module's own parameter is its own value: the reference would be to itself, as in Pyro.
        value.unconstrained = weakref.ref(unconstrained)  # type: ignore[attr-defined]
        return value

    @staticmethod
    def _make(init: Any, constraint: Any) -> nn.Parameter:
        with torch.no_grad():
            value = init() if callable(init) and not isinstance(init, torch.Tensor) else init
            # pyro.module hands over a module's parameter: that very tensor must train.
            if isinstance(value, nn.Parameter) and constraint is constraints.real:
                return value
            return nn.Parameter(transform_to(constraint).inv(value.detach()).clone())


class LocalParamMessenger(Messenger):
    """Answers ``pyro.param`` statements from a :class:`ParamStoreModule`."""

    def __init__(self, store: ParamStoreModule) -> None:
        super().__init__()
        self.store = store

    def _pyro_param(self, msg: Any) -> None:
        # PyroModules announce their own parameters by a stand-in function; only a bare statement
        # asks the global store.
        if getattr(msg["fn"], "__self__", None) is not pyro.get_param_store() or msg["done"]:
            return
        name, *rest = msg["args"]
        init = rest[0] if rest else msg["kwargs"].get("init_tensor")
        constraint = msg["kwargs"].get("constraint", constraints.real)
        msg["value"] = self.store.get(name, init, constraint)
        msg["done"] = True


def untracked_leaves(loss: torch.Tensor, module: nn.Module) -> list[torch.Tensor]:
    """Find trainable tensors that the loss depends on and that are no parameters of the module."""
    known = {id(p) for p in module.parameters()}
    found: dict[int, torch.Tensor] = {}
    pending: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            found[id(leaf)] = leaf
        pending.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
