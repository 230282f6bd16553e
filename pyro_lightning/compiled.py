"""Compiled losses of a module: one for each batch shape, trusted once it was compared with eager."""

import random
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pyro_lightning._upstream import compile_graph
from pyro_lightning.guards import Guard, changed, find_guards
from pyro_lightning.program import Program, StepInputs, step_inputs
from pyro_lightning.states import preserved_state
from pyro_lightning.tracing import Untraceable

_PATIENCE = 20  # steps of another shape, or of other Python state, before it is compiled as well
_MOST = 8  # compiled programs; what comes then stays eager


def read_compile(compile: Any) -> "CompiledLoss | None":
    """Read the argument ``compile``: False, True, ``"strict"``, or options of ``torch.compile``.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(compile, Mapping):
        return CompiledLoss(compile, strict=False)
    if compile is False:
        return None
    if compile is True or compile == "strict":
        return CompiledLoss({}, strict=compile == "strict")
    raise TypeError(
        f"compile must be False, True, 'strict' or a dict of torch.compile's options; got {compile!r}"
    )


class _Entry:
    """A batch shape with the Python state of its steps."""

    def __init__(self, key: Any, guards: list[Guard]) -> None:
        self.key = key
        self.guards = guards
        self.uses = 0
        self.program: Program | None = None
        self.traced_on: list[torch.Tensor] = []
        self.trusted = False
        self.failed = False


class CompiledLoss:
    """Computes a module's loss by compiled code where it can be trusted.

    Args:
        options: Arguments of ``torch.compile``.
        strict: Whether what cannot be compiled is an error.
    """

    def __init__(self, options: Mapping[str, Any], strict: bool) -> None:
        self.options = dict(options)
        self.strict = strict
        self.traces = 0
        self.compilations = 0
        self._entries: list[_Entry] = []
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code belongs to a process and to one module's tensors.
        return {"options": self.options, "strict": self.strict}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def loss(self, module: Any, batch: Any) -> torch.Tensor | None:
        """Return the loss of a batch, or None where the eager loss serves.

        Raises:
            RuntimeError: When the loss cannot be compiled and ``strict`` is set.
        """
        try:
            inputs = step_inputs(module, batch)
            entry = self._entry(module, inputs)
            entry.uses += 1
            if entry.failed:
                return None
            if not entry.trusted and not self._prepared(module, batch, inputs, entry):
                return None
            assert entry.program is not None
            return entry.program.loss(inputs)
        except Untraceable as error:
            self._refuse(error)
            return None

    def _entry(self, module: Any, inputs: StepInputs) -> _Entry:
        reason = None
        for entry in self._entries:
            if entry.key == inputs.key:
                reason = changed(entry.guards)
                if reason is None:
                    return entry
        made = _Entry(inputs.key, find_guards([module.model, module.guide, module.elbo], module._hides))
        self._entries.append(made)
        return made

    def _prepared(self, module: Any, batch: Any, inputs: StepInputs, entry: _Entry) -> bool:
        try:
            if entry.program is None:
                if entry.uses == 1 + (0 if self.traces == 0 else _PATIENCE) and self.traces < _MOST:
                    self._trace(module, inputs, entry)
                return False
            if _same(entry.traced_on, inputs.flat.tensors):
                return False
            self._verify(module, batch, inputs, entry)
            return entry.trusted
        except Untraceable:
            entry.failed = True
            raise
        except Exception as error:  # whatever it is, eager still serves; the cause is told
            entry.failed = True
            raise Untraceable(f"{type(error).__name__}: {error}") from error

    def _trace(self, module: Any, inputs: StepInputs, entry: _Entry) -> None:
        self.traces += 1
        before = random.getstate(), np.random.get_state()
        with preserved_state(module):
            entry.program = Program(module, inputs)
            after = random.getstate(), np.random.get_state()
        if before[0] != after[0] or not all(map(np.array_equal, before[1], after[1])):
            raise Untraceable(
                "the model draws from Python's or NumPy's random numbers, which would be the same "
                "at each step: draw from torch's"
            )
        name = changed(entry.guards)
        if name is not None:
            raise Untraceable(f"the model changes '{name}' as it runs")
        entry.traced_on = [tensor.clone() for tensor in inputs.flat.tensors]

    def _verify(self, module: Any, batch: Any, inputs: StepInputs, entry: _Entry) -> None:
        program = entry.program
        assert program is not None
        parameters = [p for p in module.parameters() if p.requires_grad]
        expected = _of_eager(module, batch, parameters)
        _compare(_of_program(module, program, inputs, parameters), expected, "its trace")
        self.compilations += 1
        program.run = compile_graph(program.traced.graph, program.example(inputs), self.options)
        _compare(_of_program(module, program, inputs, parameters), expected, "compiled code")
        entry.trusted = True
        entry.traced_on = []

    def _refuse(self, error: Untraceable) -> None:
        reason = str(error)
        if self.strict:
            raise RuntimeError(f"the loss cannot be compiled: {reason}") from error
        if not self._warned:
            warnings.warn(
                f"the loss is not compiled, and runs eagerly: {reason}. Leave compile out, or "
                "change the model; compile='strict' makes this an error.",
                UserWarning,
                stacklevel=2,
            )
        self._warned.add(reason)


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


_Result = tuple[torch.Tensor, list[torch.Tensor | None]]


def _of_eager(module: Any, batch: Any, parameters: list[torch.Tensor]) -> _Result:
    with preserved_state(module):
        return _differentiated(module._run(batch).loss, parameters)


def _of_program(
    module: Any, program: Program, inputs: StepInputs, parameters: list[torch.Tensor]
) -> _Result:
    with preserved_state(module):
        return _differentiated(program.loss(inputs), parameters)


def _differentiated(loss: torch.Tensor, parameters: list[torch.Tensor]) -> _Result:
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), [None if g is None else _values(g) for g in grads]


def _values(grad: torch.Tensor) -> torch.Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad


def _compare(found: _Result, expected: _Result, what: str) -> None:
    """Compare losses and gradients, to half the digits of their type.

    A gradient near 0 is the rest of large terms that cancel: it is compared to the rounding of the
    largest gradient as well.
    """
    (loss, grads), (true_loss, true_grads) = found, expected
    eps = max(torch.finfo(t.dtype).eps for t in (loss, *(g for g in true_grads if g is not None)))
    if torch.is_autocast_enabled(loss.device.type):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(loss.device.type)).eps)
    known = [g for g in true_grads if g is not None and g.numel()]
    largest = max((float(g.abs().max()) for g in known), default=0.0)
    pairs = [(loss, true_loss, 0.0)]
    for grad, true in zip(grads, true_grads, strict=True):
        if (grad is None) != (true is None):
            raise Untraceable(f"another parameter has a gradient in {what} than in eager")
        if grad is not None and true is not None and true.numel():
            pairs.append((grad, true, 64 * eps * largest))
    for one, other, allowed in pairs:
        if one.shape != other.shape:
            raise Untraceable(f"a gradient has another shape in {what} than in eager")
        bound = max(eps**0.5 * float(other.abs().max()), allowed)
        if not float((one - other).abs().max()) <= bound:
            raise Untraceable(
                f"{what} differs from eager at the same random numbers on another batch: the model "
                "may read values of its batch into Python, or keep state from call to call"
            )
