"""Compiled losses of a module: one for each batch shape, compared with eager before its use."""

import random
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from pyro_lightning._upstream import compile_graph
from pyro_lightning.fused import FusedStep
from pyro_lightning.guards import Guard, changed, find_guards
from pyro_lightning.program import Program, StepInputs, step_inputs
from pyro_lightning.states import preserved_state
from pyro_lightning.tracing import Untraceable
from pyro_lightning.updates import is_served

_PATIENCE = 20  # steps of another shape, or of other Python state, before it is compiled as well
_MOST = 8  # traces; what comes then stays eager
_MOST_KEPT = 64  # shapes and states that are remembered


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
        "compile must be False, True, 'strict' or a dict of torch.compile's options; got "
        f"{compile!r}"
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
        self.compiled = False
        self.failed = False
        self.fused: FusedStep | None = None
        self.optimizer: Any = None


class CompiledLoss:
    """Computes a module's loss by compiled code where it can be trusted.

    A batch shape's first step is eager, and traced; before the second, the trace is compared with
    eager at equal random numbers on the batch of that step. Python state that model and guide can
    reach is watched: other state is another trace. A second shape, or state, is traced once it has
    been met often, since compiling takes as long as a thousand small steps.

    Args:
        options: Arguments of ``torch.compile``.
        strict: Whether what cannot be compiled is an error.

    Attributes:
        traces: How many traces were made.
        compilations: How many of them were compiled, for the loss and for whole steps.
    """

    def __init__(self, options: Mapping[str, Any], strict: bool) -> None:
        self.options = dict(options)
        self.strict = strict
        self.traces = 0
        self.compilations = 0
        self._entries: list[_Entry] = []
        self._warned = False

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
        if not _trained(module):
            return None  # there is no gradient to compute
        with self._refusing():
            inputs = step_inputs(module, batch)
            entry = self._entry(module, inputs)
            with _failing(entry):
                if not self._trusted(module, batch, inputs, entry):
                    return None
                assert entry.program is not None
                if not entry.compiled:
                    self._compile(module, batch, inputs, entry)
                return entry.program.loss(inputs)
        return None

    def step(self, module: Any, batch: Any, optimizer: Optimizer) -> FusedStep | None:
        """Return what takes whole steps on batches like this one, or None where there is none.

        Raises:
            RuntimeError: When the loss cannot be compiled and ``strict`` is set.
        """
        with self._refusing():
            inputs = step_inputs(module, batch)
            entry = self._entry(module, inputs)
            with _failing(entry):
                if not self._trusted(module, batch, inputs, entry):
                    return None
                if entry.optimizer is not optimizer:
                    entry.optimizer, entry.fused = optimizer, None
                    if is_served(optimizer):
                        assert entry.program is not None
                        self.compilations += 1
                        entry.fused = FusedStep(entry.program, optimizer, inputs, self.options)
                return entry.fused
        return None

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Say once why the loss is not compiled; the eager one serves."""
        try:
            yield
        except Untraceable as error:
            if self.strict:
                raise RuntimeError(f"the loss cannot be compiled: {error}") from error
            if not self._warned:
                warnings.warn(
                    f"the loss is not compiled, and runs eagerly: {error}. Leave compile out, or "
                    "change the model; compile='strict' makes this an error.",
                    UserWarning,
                    stacklevel=4,
                )
            self._warned = True

    def _entry(self, module: Any, inputs: StepInputs) -> _Entry:
        reasons = set()
        for entry in self._entries:
            if entry.key == inputs.key:
                reason = changed(entry.guards)
                if reason is None:
                    return entry
                reasons.add(reason)
        if len(self._entries) >= _MOST_KEPT:
            names = f": {', '.join(sorted(reasons))} changes from step to step" if reasons else ""
            raise Untraceable(
                f"batches have come in {_MOST_KEPT} shapes, with other Python state{names}. Make "
                "what changes a tensor, such as a buffer, which compiled code reads at each step"
            )
        guards = find_guards([module.model, module.guide, module.elbo], module._hides)
        self._entries.append(_Entry(inputs.key, guards))
        return self._entries[-1]

    def _trusted(self, module: Any, batch: Any, inputs: StepInputs, entry: _Entry) -> bool:
        """Bring a batch shape nearer to its compiled code; tells whether it may be used."""
        entry.uses += 1
        if entry.trusted or entry.failed:
            return entry.trusted and not entry.failed
        if entry.program is None:
            # The first is traced at once.
            if self.traces < _MOST and (self.traces == 0 or entry.uses > _PATIENCE):
                self._trace(module, inputs, entry)
            return False
        if all(map(torch.equal, entry.traced_on, inputs.flat.tensors)):
            return False  # not another batch
        parameters = _trained(module)
        expected = _of_eager(module, batch, parameters)
        _compare(_of_program(module, entry.program, inputs, parameters), expected, "a trace")
        entry.trusted, entry.traced_on = True, []
        return True

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

    def _compile(self, module: Any, batch: Any, inputs: StepInputs, entry: _Entry) -> None:
        program = entry.program
        assert program is not None
        parameters = _trained(module)
        expected = _of_program(module, program, inputs, parameters)
        self.compilations += 1
        program.run = compile_graph(program.traced.graph, program.example(inputs), self.options)
        _compare(_of_program(module, program, inputs, parameters), expected, "compiled code")
        entry.compiled = True


@contextmanager
def _failing(entry: _Entry) -> Iterator[None]:
    """Let a batch shape stay eager from its first failure on."""
    try:
        yield
    except Exception as error:
        entry.failed = True
        if isinstance(error, Untraceable):
            raise
        # Whatever tracing and compiling meet, the eager loss serves, and the cause is told.
        raise Untraceable(f"{type(error).__name__}: {error}{_where(error)}") from error


def _where(error: Exception) -> str:
    """Name the last line of the user's own code that an error came through."""
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("site-packages", "pyro_lightning", "<"))
    ]
    return f" (at {lines[-1]})" if lines else ""


def _trained(module: Any) -> list[torch.Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


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
