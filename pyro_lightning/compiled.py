"""Compiled losses of a module: one for each batch shape, compared with eager before its use."""

import os
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from pyro_lightning._upstream import compile_graph
from pyro_lightning.arguments import shortly
from pyro_lightning.compared import compare, of_eager, of_program, trained
from pyro_lightning.fused import FusedStep, has_state
from pyro_lightning.guards import Guard, changed, find_guards
from pyro_lightning.program import Program, StepInputs, step_inputs
from pyro_lightning.states import drawing, drawing_in_python, preserved_state
from pyro_lightning.tracing import NotCompiled, Untraceable
from pyro_lightning.updates import is_served

_PATIENCE = 20  # steps of another shape, or of other Python state, before it is compiled as well
_MOST = 8  # traces; what comes then stays eager
_MOST_KEPT = 64  # shapes and states that are remembered
_ASKED = 3  # steps in which the inputs are watched for random numbers
_MOST_FUSED = 3  # compiled steps for one optimizer, whose groups may change


def read_compile(compile: Any) -> "CompiledLoss | None":
    """Read the argument ``compile``: False, True, ``"strict"``, or options of ``torch.compile``.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(compile, Mapping):
        return CompiledLoss(compile, strict=False)
    if compile is False:
        return None
    if compile is True or (isinstance(compile, str) and compile == "strict"):
        return CompiledLoss({}, strict=compile == "strict")
    raise TypeError(
        "compile must be False, True, 'strict' or a dict of torch.compile's options; got "
        f"{shortly(compile)}"
    )


class _Entry:
    """A batch shape with the Python state of its steps."""

    def __init__(self, key: Any, guards: list[Guard]) -> None:
        self.key = key
        self.guards = guards
        self.uses = 0
        self.program: Program | None = None
        self.traced_on: list[torch.Tensor] = []
        self.compared = False
        self.trusted = False  # compared on another batch
        self.compiled = False
        self.failed = False
        self.fused: FusedStep | None = None
        self.optimizer: Any = None
        self.made = 0
        self.waits = False  # for a step that is compiled whole

    def parameters_changed(self) -> str | None:
        """Say so when parameters are of another kind than in the trace."""
        fits = self.program is None or self.program.fits()
        return None if fits else "requires_grad or type of parameters"


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
        self._asked = 0
        self._draws = False

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
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return None  # there is no gradient to compute
        with self._refusing():
            inputs = self._inputs(module, batch)
            entry = self._entry(module, inputs)
            if not self._may_be_used(module, batch, inputs, entry):
                return None
            if entry.waits and not entry.compiled:
                entry.waits = False
                return None
            with _failing(entry):
                assert entry.program is not None
                if not entry.compiled:
                    self._compile(module, inputs, entry)
                return entry.program.loss(inputs)
        return None

    def step(self, module: Any, batch: Any, optimizer: Optimizer) -> FusedStep | None:
        """Return what takes whole steps on batches like this one, or None where there is none.

        It has begun: whoever asks for it finishes it.

        Raises:
            RuntimeError: When the loss cannot be compiled and ``strict`` is set.
        """
        with self._refusing():
            inputs = self._inputs(module, batch)
            entry = self._entry(module, inputs)
            if not self._may_be_used(module, batch, inputs, entry) or not entry.trusted:
                return None
            with _failing(entry):
                return self._fused(entry, optimizer, inputs)
        return None

    def _fused(self, entry: _Entry, optimizer: Optimizer, inputs: StepInputs) -> FusedStep | None:
        assert entry.program is not None
        if entry.optimizer is optimizer and entry.fused is not None and entry.fused.fits():
            entry.fused.begin()
            return entry.fused
        if entry.optimizer is not optimizer:
            entry.optimizer, entry.made = optimizer, 0
        entry.fused = None
        if not is_served(optimizer) or entry.made >= _MOST_FUSED:
            return None
        if not has_state(entry.program, optimizer):
            entry.waits = True  # a new optimizer's first step is eager, and makes its state
            return None
        entry.made += 1
        self.compilations += 1
        entry.fused = FusedStep(entry.program, optimizer, inputs, self.options)
        return entry.fused

    def _inputs(self, module: Any, batch: Any) -> StepInputs:
        """Read a step's inputs, which must not take random numbers from the eager step."""
        inputs = None
        if not self._draws and self._asked < _ASKED:
            self._asked += 1
            inputs, self._draws = drawing(partial(step_inputs, module, batch))
        if self._draws:
            raise Untraceable("model_inputs or num_rows draws random numbers: draw in the model")
        return inputs or step_inputs(module, batch)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Say once why the loss is not compiled; the eager one serves."""
        try:
            yield
        except Untraceable as error:
            if self.strict:
                raise NotCompiled(f"the loss cannot be compiled: {error}") from error
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
                reason = changed(entry.guards) or entry.parameters_changed()
                if reason is None:
                    return entry
                reasons.add(reason)
        if len(self._entries) >= _MOST_KEPT:
            names = f": {', '.join(sorted(reasons))} changes from step to step" if reasons else ""
            raise Untraceable(
                f"batches have come in {_MOST_KEPT} shapes, with other Python state{names}. Make "
                "what changes a tensor, such as a buffer, which compiled code reads at each step"
            )
        guards = find_guards([module.model, module.guide, module.elbo], module._hides())
        guards += module._counters()
        self._entries.append(_Entry(inputs.key, guards))
        return self._entries[-1]

    def _may_be_used(self, module: Any, batch: Any, inputs: StepInputs, entry: _Entry) -> bool:
        """Bring a batch shape nearer to its compiled code; tells whether this batch may use it."""
        entry.uses += 1
        if entry.trusted or entry.failed:
            return not entry.failed
        if entry.program is None:
            # The first is traced at once.
            if self.traces < _MOST and (self.traces == 0 or entry.uses > _PATIENCE):
                with _failing(entry):
                    self._trace(module, inputs, entry)
            return False
        # Values that were read of the batch hold for this very batch, such as one of all N rows.
        same = all(map(torch.equal, entry.traced_on, inputs.flat.tensors))
        if same and (entry.compared or entry.uses < 3):  # one step may ask twice
            return entry.compared
        parameters = trained(module)
        expected = of_eager(module, batch, parameters)  # whose errors are the user's
        with _failing(entry):
            compare(of_program(module, entry.program, inputs, parameters), expected, "a trace")
        entry.compared = True
        if not same:
            entry.trusted, entry.traced_on = True, []
        return True

    def _trace(self, module: Any, inputs: StepInputs, entry: _Entry) -> None:
        self.traces += 1
        with preserved_state(module):
            drew = drawing_in_python()
            entry.program = Program(module, inputs)
            drawn = drew()
        if drawn:
            raise Untraceable(
                "the model draws from Python's or NumPy's random numbers, which would be the same "
                "at each step: draw from torch's"
            )
        name = changed(entry.guards)
        if name is not None:
            raise Untraceable(f"the model changes '{name}' as it runs")
        entry.traced_on = [tensor.clone() for tensor in inputs.flat.tensors]

    def _compile(self, module: Any, inputs: StepInputs, entry: _Entry) -> None:
        program = entry.program
        assert program is not None
        parameters = trained(module)
        expected = of_program(module, program, inputs, parameters)
        self.compilations += 1
        program.run = compile_graph(program.traced.graph, program.example(inputs), self.options)
        compare(of_program(module, program, inputs, parameters), expected, "compiled code")
        entry.compiled = True


@contextmanager
def _failing(entry: _Entry) -> Iterator[None]:
    """Let a batch shape stay eager from its first failure on."""
    try:
        yield
    except Exception as error:
        entry.failed = True
        # Whatever tracing and compiling meet, the eager loss serves, and the cause is told.
        kind = "" if isinstance(error, Untraceable) else f"{type(error).__name__}: "
        raise Untraceable(f"{kind}{error}{_where(error)}") from error


_NOT_THE_USERS = (os.path.dirname(__file__), sysconfig.get_paths()["stdlib"], "<")


def _where(error: Exception) -> str:
    """Name the last line of the user's own code that an error came through."""
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS) and "site-packages" not in frame.filename
    ]
    return f" (at {lines[-1]})" if lines else ""
