"""Parameters that belong to the module, never to Pyro's global store."""

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from pyro.nn.module import _Context
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions import constraints, transform_to

from pyro_lightning.gather import gather_rows, is_taken, missing_rows
from pyro_lightning.handlers import is_subsample
from pyro_lightning.tracing import Untraceable

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


class RowsOfBatch(NamedTuple):
    """Which rows a batch holds, for parameters of each row.

    Attributes:
        plates: Names of the data plates over rows.
        rows: Their numbers, ``(B,)``; None where the batch does not tell.
        identities: How many rows have a number.
    """

    plates: Collection[str]
    rows: torch.Tensor | None
    identities: int


class RowParam(NamedTuple):
    """A ``pyro.param`` statement in a data plate, with one entry for each row.

    Attributes:
        site: Name of the parameter.
        plate: Name of the data plate.
        dim: The dimension of the rows, from the left.
        parameter: The unconstrained parameter, all rows of it.
    """

    site: str
    plate: str
    dim: int
    parameter: nn.Parameter

    @property
    def holder(self) -> str:
        """What has the parameter, for an error."""
        return _holder(self.site)


def _holder(name: str) -> str:
    return f"there are parameters for each row (pyro.param('{name}')"


class ParamStoreModule(nn.Module):
    """Holds what ``pyro.param`` statements of a function declare, as ordinary parameters.

    A statement's constraint is kept: the parameter is unconstrained, its value is transformed.
    Names may hold dots, which ``state_dict`` does not allow in one name: they become ``|``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constraints: dict[str, Any] = {}
        self._rows: dict[str, tuple[str, int]] = {}

    def row_params(self) -> list[RowParam]:
        """List the parameters that have one entry for each row of a data plate."""
        held = ((name, *place, self._parameters[_key(name)]) for name, place in self._rows.items())
        return [RowParam(*each) for each in held if each[-1] is not None]  # type: ignore[arg-type]

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
        self, name: str, init: Any, constraint: Any, owned: Callable[[torch.Tensor], bool]
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
            # A trace has other tensors in the place of parameters.
            if isinstance(init, torch.Tensor) and owned(init):
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

    def get_rows(self, name: str, init: Any, constraint: Any, place: "_Place") -> torch.Tensor:
        """Return the constrained value at the rows of a batch, of a statement in a data plate.

        As in Pyro, ``event_dim`` says that the dimension of the plate holds its rows, all N of
        them. A dimension of 1 is shared by all rows.

        Raises:
            ValueError: When it holds another number of rows, or the batch does not tell its own.
        """
        key = _key(name)
        known, frame = place.known, place.frame
        if name not in self._rows:
            whole = self.get(name, init, constraint, lambda _: False)
            dim = whole.dim() - place.event_dim + frame.dim
            size = whole.shape[dim] if dim >= 0 else 1
            if size == 1:
                return whole
            if size != known.identities:
                raise ValueError(
                    f"pyro.param('{name}', ..., event_dim={place.event_dim}) has {size} entries in "
                    f"the data plate '{frame.name}', one for each row of a batch, where it would "
                    f"be taken for other rows in the next. Give it one for each of all "
                    f"{known.identities} rows, or compute it from the row by a network."
                )
            self._rows[name] = frame.name, dim
        plate, dim = self._rows[name]
        rows = known.rows if place.given is None else place.given
        if rows is None:
            raise ValueError(missing_rows(_holder(name), plate))
        unconstrained = self._parameters[key]
        assert unconstrained is not None
        if is_taken(unconstrained) and place.given is not None:
            raise Untraceable(f"the model gives the plate '{plate}' its rows itself")
        taken = gather_rows(unconstrained, rows.to(unconstrained.device), dim)
        value: torch.Tensor = transform_to(self._constraints[name])(taken)
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


def shown_name(name: str) -> str:
    """Return the name by which a user knows a parameter of a module.

    Example:
        >>> shown_name("_pyro_param_store.net|loc"), shown_name("guide.scale_unconstrained")
        ('net.loc', 'guide.scale')
    """
    name = name.removeprefix("_pyro_param_store.").replace("|", ".")
    return name.removesuffix("_unconstrained")


def _key(name: str) -> str:
    return name.replace(".", "|")


class _Place(NamedTuple):
    """Where a statement stands: its data plate, and what is known of the rows there."""

    frame: Any
    event_dim: int
    known: RowsOfBatch
    given: torch.Tensor | None


class LocalParamMessenger(Messenger):
    """Answers ``pyro.param`` statements from a :class:`ParamStoreModule`.

    Args:
        store: Where the parameters live.
        owned: Whether a parameter is trained already, by another name.
        rows: Tells which rows the batch holds, or None outside of one.
    """

    def __init__(
        self,
        store: ParamStoreModule,
        owned: Callable[[torch.Tensor], bool],
        rows: Callable[[], RowsOfBatch | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.store = store
        self.owned = owned
        self.rows = rows
        self.given: dict[str, torch.Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and msg["value"] is not None:
            self.given[msg["name"]] = torch.as_tensor(msg["value"])

    def _place(self, msg: Any) -> _Place | None:
        event_dim, known = msg["kwargs"].get("event_dim"), self.rows()
        if event_dim is None or known is None:
            return None
        for frame in msg["cond_indep_stack"]:
            if frame.name in known.plates and frame.dim is not None:
                return _Place(frame, event_dim, known, self.given.get(frame.name))
        return None

    def _pyro_param(self, msg: Any) -> None:
        if msg["done"] or not is_statement(msg):
            return
        name, *rest = msg["args"]
        init = rest[0] if rest else msg["kwargs"].get("init_tensor")
        constraint = msg["kwargs"].get("constraint", constraints.real)
        place = self._place(msg)
        if place is None:
            msg["value"] = self.store.get(name, init, constraint, self.owned)
        else:
            msg["value"] = self.store.get_rows(name, init, constraint, place)
            # The plate would take its rows of a value that holds those of the batch alone.
            msg["kwargs"] = {**msg["kwargs"], "event_dim": None}
        msg["done"] = True


def is_statement(msg: Any) -> bool:
    """Whether a message is that of a ``pyro.param`` statement, and no PyroModule's own parameter.

    PyroModules announce theirs by a stand-in function; only a bare statement asks the global store.
    """
    return getattr(msg["fn"], "__self__", None) is pyro.get_param_store()


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
