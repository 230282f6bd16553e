"""A whole step, loss, gradients and the optimizer's update, as one compiled call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from pyro_lightning._upstream import compile_graph, copy_all, make_graph
from pyro_lightning.program import Program, StepInputs
from pyro_lightning.states import forked_noise
from pyro_lightning.tracing import Untraceable
from pyro_lightning.updates import kind_of, numbers_of, state_names, update


class _Dense(NamedTuple):
    """Parameters of one optimizer group, which a step sees as one flat vector."""

    number: int  # of the group
    places: list[int]  # among what the loss is differentiated by
    parameters: list[torch.Tensor]
    names: list[str]


class _Rows(NamedTuple):
    """A table of parameters, of which a step sees the rows of its batch."""

    number: int  # of the group
    place: int
    table: Any
    names: list[str]


def has_state(program: Program, optimizer: Optimizer) -> bool:
    """Whether an optimizer has taken a step, after which it has a state, with all that moves."""
    used = {id(p) for p, u in zip(program.parameters, program.traced.used, strict=True) if u}
    return all(
        optimizer.state.get(p, {}).get(name) is not None
        for group in optimizer.param_groups
        for name in state_names(optimizer, group)
        for p in group["params"]
        if id(p) in used
    )


def _kind(optimizer: Optimizer) -> list[Any]:
    return [
        (kind_of(optimizer, group), [id(p) for p in group["params"]])
        for group in optimizer.param_groups
    ]


class FusedStep:
    """Takes optimizer steps on batches of one shape, each in one call of compiled code.

    Between :meth:`begin` and :meth:`finish` dense parameters and the optimizer's state of them live
    in one vector for each group, so that the update is one loop over it. A step whose loss is not
    finite changes nothing.

    Args:
        program: The traced loss.
        optimizer: One whose update is served, and which :func:`has_state`.
        inputs: Those of a step, for shapes.
        options: Arguments of ``torch.compile``.

    Attributes:
        structure: That of the batches' arguments.
        inputs: Those of the batch that :meth:`begin` was called for.
        scheduled: Whether numbers of the optimizer, or the weight, may change from step to step
            between :meth:`begin` and :meth:`finish`.

    Raises:
        Untraceable: When the optimizer cannot be a part of it.
    """

    def __init__(
        self,
        program: Program,
        optimizer: Optimizer,
        inputs: StepInputs,
        options: Mapping[str, Any],
    ) -> None:
        self._program, self._optimizer, self._options = program, optimizer, options
        self._kind, self.structure = _kind(optimizer), inputs.flat.structure
        self.inputs = inputs
        self._split_parameters()
        self._scalars: dict[Any, torch.Tensor] = {}
        self._begun: list[list[torch.Tensor]] = []
        self._flat: list[torch.Tensor] = []
        self._others: list[torch.Tensor] | None = None
        self.scheduled = True
        self.begin()
        example = self._arguments(inputs.rows, inputs.flat.tensors, 1.0)
        with forked_noise():  # a trace draws random numbers as it runs
            graph = make_graph(self._step, _copies(example))
        self._run: Callable[..., Any] = compile_graph(graph, _copies(example), options)
        self._check(graph, example)
        self._others = None  # the example's weight is none of a batch's

    # -- what goes in ----------------------------------------------------------------------------
    def _split_parameters(self) -> None:
        program, optimizer = self._program, self._optimizer
        free = program.parameters
        used = dict(zip(map(id, free), program.traced.used, strict=True))
        places = {id(p): place for place, p in enumerate(free)}
        tables = {id(table.parameter): table for table in program.tables}
        self._dense: list[_Dense] = []
        self._rows: list[_Rows] = []
        for number, group in enumerate(optimizer.param_groups):
            mine = [p for p in group["params"] if used.get(id(p))]
            names = state_names(optimizer, group)
            alike: dict[Any, list[torch.Tensor]] = {}
            for p in mine:
                if id(p) not in tables:
                    steps = float(optimizer.state[p]["step"]) if "step" in names else 0.0
                    alike.setdefault((p.dtype, p.device, steps), []).append(p)
            for each in alike.values():
                self._dense.append(_Dense(number, [places[id(p)] for p in each], each, names))
            self._rows += [
                _Rows(number, places[id(p)], tables[id(p)], names) for p in mine if id(p) in tables
            ]
        moved = {place for dense in self._dense for place in dense.places}
        moved |= {rows.place for rows in self._rows}
        self._rest = [p for place, p in enumerate(free) if place not in moved]
        if any(id(p) in tables for p in self._rest):
            raise Untraceable("a table of rows is not the optimizer's")
        self._moved = moved
        if not moved:
            raise Untraceable("the optimizer moves no parameter of the loss")

    @property
    def _groups(self) -> list[dict[str, Any]]:
        # Looked up each time: load_state_dict gives the optimizer other dicts.
        groups = self._optimizer.param_groups
        numbers = [each.number for each in self._dense] + [each.number for each in self._rows]
        return [groups[number] for number in numbers]

    def fits(self) -> bool:
        """Whether the optimizer has the groups that it had, but for numbers of theirs, and state.

        A checkpoint of a fit's beginning, which has none, may have been loaded in its middle.
        """
        parts = [*((d.parameters[0], d.names) for d in self._dense)]
        parts += [(each.table.parameter, each.names) for each in self._rows]
        held = self._optimizer.state
        kept = all(name in held.get(p, ()) for p, names in parts for name in names)
        return kept and self._kind == _kind(self._optimizer)

    def begin(self) -> None:
        """Gather dense parameters and their state."""
        self._begun = []
        for dense in self._dense:
            held = [torch.cat([p.detach().reshape(-1) for p in dense.parameters])]
            for name in dense.names:
                states = [self._optimizer.state[p][name] for p in dense.parameters]
                if name == "step":
                    steps = {float(state) for state in states}
                    if len(steps) > 1:
                        raise Untraceable("parameters of one group differ in their count of steps")
                    held.append(torch.full((), steps.pop(), device=held[0].device))
                else:
                    held.append(torch.cat([state.reshape(-1) for state in states]))
            self._begun.append(held)
        self._flat = [tensor for held in self._begun for tensor in held]
        self._others = None

    def finish(self) -> None:
        """Put dense parameters and their state back."""
        with torch.no_grad():
            for dense, held in zip(self._dense, self._begun, strict=True):
                sizes = [p.numel() for p in dense.parameters]
                for name, flat in zip(["value", *dense.names], held, strict=True):
                    states = [
                        p if name == "value" else self._optimizer.state[p][name]
                        for p in dense.parameters
                    ]
                    if name == "step":
                        for state in states:
                            state.fill_(float(flat))
                        continue
                    parts = [
                        part.view_as(p)
                        for part, p in zip(torch.split(flat, sizes), dense.parameters, strict=True)
                    ]
                    copy_all([state.data for state in states], parts)
        self._begun, self._flat, self._others = [], [], None

    def _arguments(
        self, rows: torch.Tensor | None, tensors: Sequence[torch.Tensor], weight: float
    ) -> list[torch.Tensor]:
        given = self._flat.copy()
        for each in self._rows:
            assert rows is not None
            given += [t.index_select(each.table.dim, rows) for t in self._held(each)]
        if self._others is None or self.scheduled:
            device = given[0].device
            self._others = [
                self._scalar(weight, device),
                *(
                    self._scalar(tuple(numbers_of(self._optimizer, g)), device)
                    for g in self._groups
                ),
                *(p.detach() for p in self._rest),
                *self._program.fixed(),
            ]
        return [*given, *self._others, *tensors, *self._program.traced.constants]

    def _held(self, rows: _Rows) -> list[torch.Tensor]:
        parameter = rows.table.parameter
        return [parameter.detach(), *(self._optimizer.state[parameter][n] for n in rows.names)]

    def _scalar(self, value: float | tuple[float, ...], device: torch.device) -> torch.Tensor:
        # Kept: a learning rate changes at most once a step, and a copy to a GPU would wait for it.
        key = (value, device)
        if key not in self._scalars:
            if len(self._scalars) > 1000:
                self._scalars.clear()
            # Scalars take on the type of what they meet, so that these can be as exact as Python's.
            exact = torch.float32 if device.type == "mps" else torch.float64
            self._scalars[key] = torch.tensor(value, device=device, dtype=exact)
        return self._scalars[key]

    # -- the step --------------------------------------------------------------------------------
    def _step(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """Take one step; in a graph only. Returns the loss and the new rows of each table."""
        left = iter(given)
        dense = [[next(left) for _ in range(1 + len(d.names))] for d in self._dense]
        rows = [[next(left) for _ in range(1 + len(r.names))] for r in self._rows]
        weight = next(left)
        numbers = [next(left).unbind() for _ in self._groups]
        count = len(self._program.traced.used)
        free: list[Any] = [None] * count
        for each, held in zip(self._dense, dense, strict=True):
            parts = torch.split(held[0], [p.numel() for p in each.parameters])
            for place, p, part in zip(each.places, each.parameters, parts, strict=True):
                free[place] = part.view(p.shape)
        for table, held in zip(self._rows, rows, strict=True):
            free[table.place] = held[0]
        for place in range(count):
            if place not in self._moved:
                free[place] = next(left)
        loss, *found = self._program.traced.graph(*free, *left)
        # The graph returns the gradients of the used ones alone.
        gradients = iter(found)
        grads = [next(gradients) if used else None for used in self._program.traced.used]
        fine = torch.isfinite(loss)
        for number, (each, held) in enumerate(zip(self._dense, dense, strict=True)):
            flat = torch.cat([_known(grads[place]).reshape(-1) for place in each.places])
            for old, new in zip(
                held, self._updated(each, held, flat * weight, numbers[number]), strict=True
            ):
                old.copy_(torch.where(fine, new, old))
        changed = []
        for number, (table, held) in enumerate(zip(self._rows, rows, strict=True), len(dense)):
            grad = _known(grads[table.place]) * weight
            new_rows = self._updated(table, held, grad, numbers[number])
            changed += [torch.where(fine, n, o) for n, o in zip(new_rows, held, strict=True)]
        return [loss, *changed]

    def _updated(
        self, each: _Dense | _Rows, held: list[torch.Tensor], grad: torch.Tensor, numbers: Any
    ) -> list[torch.Tensor]:
        state = dict(zip(each.names, held[1:], strict=True))
        group = self._optimizer.param_groups[each.number]
        value, new = update(self._optimizer, group, held[0], grad, state, numbers)
        return [value, *(new[name] for name in each.names)]

    def step(
        self, rows: torch.Tensor | None, tensors: Sequence[torch.Tensor], weight: float
    ) -> torch.Tensor:
        """Take one step, and return the loss before it, a sum over N observations.

        Args:
            rows: Row numbers, each once, where there are parameters of each row.
            tensors: Those of the batch.
            weight: What multiplies the loss.
        """
        with self._program.without_autocast():
            self._program.begin_step()
            loss, *changed = self._run(*self._arguments(rows, tensors, weight))
        new = iter(changed)
        for each in self._rows:
            for held in self._held(each):
                held.index_copy_(each.table.dim, rows, next(new))  # type: ignore[arg-type]
        # CUDA graphs write the next step's loss to the same place.
        return loss.clone() if self._options else loss  # type: ignore[no-any-return]

    def _check(self, graph: Callable[..., Any], example: list[torch.Tensor]) -> None:
        """Compare compiled code with its graph, at equal random numbers.

        Raises:
            Untraceable: When they differ.
        """
        results = []
        for run in (graph, self._run):
            given = _copies(example)
            with forked_noise():
                found = run(*given)
            results.append([*found, *given])
        for one, other in zip(*results, strict=True):
            if one.dtype.is_floating_point and one.numel():
                bound = torch.finfo(one.dtype).eps ** 0.5 * float(one.nan_to_num().abs().max())
                # The example may be a batch whose loss is not finite, which both must then say.
                if not torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True):
                    raise Untraceable("compiled code of a step differs from its graph")


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _known(grad: torch.Tensor | None) -> torch.Tensor:
    assert grad is not None  # only what the loss depends on is moved
    return grad
