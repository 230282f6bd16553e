"""Parameters that belong to the module, never to Pyro's global store."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import torch
from pyro.nn.module import _Context
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import constraints, transform_to

_Result = TypeVar("_Result")


def complete_contexts(run: Callable[[], _Result]) -> _Result:
    """Run something with local parameters, making PyroModules of Pyro's default settings fit.

    Pyro gives a PyroModule's context its ``param_state`` only when the setting
    ``module_local_params`` is on as the module is built, and needs it whenever it is on later. The
    modules are met as they are called, wherever a function took them from; after each, ``run``
    starts anew.
    """
    while True:
        try:
            return run()
        except AttributeError as error:
            if error.name != "param_state" or not isinstance(error.obj, _Context):
                raise
            error.obj.param_state = {"params": {}, "constraints": {}}


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

    @contextmanager
    def as_global_store(self) -> Iterator[None]:
        """Show these parameters in place of Pyro's global store, which is put back afterwards.

        A statement that ``poutine.block`` hides from every handler outside of it goes there: an
        autoguide of some of a model's latents runs the model in this way.
        """
        params = {name: self._parameters[_key(name)] for name in self._constraints}
        state = {"params": params, "constraints": self._constraints.copy()}
        with pyro.get_param_store().scope(state):
            yield

    def get(
        self, name: str, init: Any, constraint: Any, owned: Callable[[nn.Parameter], bool]
    ) -> torch.Tensor:
        """Return the constrained value, making the parameter at its first statement.

        ``owned`` tells whether a parameter that ``pyro.module`` hands over trains already.
        """
        key = _key(name)
        if key not in self._parameters:
            if init is None:
                raise RuntimeError(
                    f"pyro.param('{name}') has no initial value at its first statement: give it "
                    "one there; parameters of other modules or of Pyro's store are not visible."
                )
            if isinstance(init, nn.Parameter) and owned(init):
                return init
            self._parameters[key] = self._make(init, constraint)
            self._constraints[name] = constraint
        unconstrained = self._parameters[key]
        assert unconstrained is not None
        # As in Pyro, the first statement's constraint holds: later ones may leave it out.
        value: torch.Tensor = transform_to(self._constraints[name])(unconstrained)
        # As in Pyro, a value leads to its parameter; it may be that very tensor.
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

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled.
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()


def _key(name: str) -> str:
    return name.replace(".", "|")


class LocalParamMessenger(Messenger):
    """Answers ``pyro.param`` statements from a :class:`ParamStoreModule`.

    Args:
        store: Where the parameters live.
        owned: Whether a parameter is trained already, by another name.
    """

    def __init__(self, store: ParamStoreModule, owned: Callable[[nn.Parameter], bool]) -> None:
        super().__init__()
        self.store = store
        self.owned = owned

    def _pyro_param(self, msg: Any) -> None:
        # PyroModules announce their own parameters by a stand-in function; only a bare statement
        # asks the global store.
        if getattr(msg["fn"], "__self__", None) is not pyro.get_param_store() or msg["done"]:
            return
        name, *rest = msg["args"]
        init = rest[0] if rest else msg["kwargs"].get("init_tensor")
        constraint = msg["kwargs"].get("constraint", constraints.real)
        msg["value"] = self.store.get(name, init, constraint, self.owned)
        msg["done"] = True


def trainable_leaves(loss: torch.Tensor) -> list[torch.Tensor]:
    """Find the tensors that a backward pass of the loss would give a gradient."""
    found: dict[int, torch.Tensor] = {}
    pending: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        pending.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
