"""Compiled losses of a module: one for each batch shape, compared with eager before its use."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from pyro_lightning._upstream import handlers_around
from pyro_lightning.arguments import shortly
from pyro_lightning.audits import Schedule
from pyro_lightning.causes import Exhausted, Unseen, failing
from pyro_lightning.compared import (
    compare,
    largest_gradient,
    of_eager,
    of_graph,
    trained,
)
from pyro_lightning.entries import Entry, label_of
from pyro_lightning.fused import FusedStep, has_state
from pyro_lightning.guards import changed
from pyro_lightning.program import StepInputs, step_inputs
from pyro_lightning.rank_zero import warn
from pyro_lightning.states import drawing
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


def asks_for_cuda_graphs(options: Mapping[str, Any]) -> bool:
    """Whether options of ``torch.compile`` have it make CUDA graphs.

    Example:
        >>> asks_for_cuda_graphs({"mode": "reduce-overhead"})
        True
    """
    named = options.get("mode") in ("reduce-overhead", "max-autotune")
    return named or bool(options.get("options", {}).get("triton.cudagraphs"))


class CompiledLoss:
    """Computes a module's loss by compiled code where it can be trusted.

    A batch shape's first step is eager, and traced; the second is eager, too, and the trace is
    compared with it at equal random numbers. Python state that model and guide can reach is
    watched: other state is another trace. Lest anything change unseen, steps from time to time are
    eager and compared again, see :class:`pyro_lightning.audits.Schedule`. A second shape, or state,
    is traced once it has been met often, since compiling takes as long as a thousand small steps.

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
        self._entries: list[Entry] = []
        self._warned: set[str] = set()
        self._asked = 0
        self._draws = False
        self._expected: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code belongs to a process and to one module's tensors.
        return {"options": self.options, "strict": self.strict}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    # -- checkpoints -----------------------------------------------------------------------------

    def kept(self) -> dict[str, dict[str, Any]]:
        """Return how far each batch shape is; of two that look alike, neither."""
        counts = Counter(entry.label for entry in self._entries)
        known = (entry for entry in self._entries if not entry.failed)
        found = {entry.label: entry.kept() for entry in known if counts[entry.label] == 1}
        return {**self._expected, **found}

    def go_on(self, kept: dict[str, dict[str, Any]]) -> None:
        """Begin anew as the fit that was saved: each step is eager or compiled as it was there."""
        self.__setstate__(self.__getstate__())
        self._expected = dict(kept)
        self.traces = sum(record["traced"] for record in kept.values())

    def _catch_up(self, module: Any, batch: Any, inputs: StepInputs, entry: Entry) -> None:
        """Trace what was traced before a fit went on, and compare it, beside the step itself."""
        record = entry.record
        if record is None or entry.failed:
            return
        if entry.program is None:
            with failing(entry):
                entry.trace(module, inputs)  # counted when the fit went on
            entry.began = _epoch(module)
            if not record["compared"]:
                return  # this step is eager, too, and the next one compiled
        elif all(map(torch.equal, entry.traced_on, inputs.flat.tensors)):
            return
        assert entry.program is not None
        parameters, put_back = trained(module), module._kept()
        try:
            expected = of_eager(module._run(batch).loss, parameters)  # whose errors are the user's
        finally:
            put_back()
        with failing(entry):
            found = of_graph(module, entry.program, inputs, parameters)
            compare(found, expected, "a trace", record["largest"])
        entry.caught_up()

    # -- steps -----------------------------------------------------------------------------------

    def loss(self, module: Any, batch: Any) -> torch.Tensor | None:
        """Return the loss of a batch, or None where the eager loss serves.

        Raises:
            RuntimeError: When the loss cannot be compiled and ``strict`` is set.
        """
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return None  # there is no gradient to compute
        losses: list[torch.Tensor] = []
        with self._refusing():
            inputs = self._inputs(module, batch)
            entry = self._entry(module, inputs)
            self._catch_up(module, batch, inputs, entry)
            entry.uses += 1
            if entry.failed or not self._is_traced(module, inputs, entry):
                return None
            assert entry.program is not None
            # Values that were read of the batch hold for this very batch, such as one of all rows.
            same = not entry.trusted and all(map(torch.equal, entry.traced_on, inputs.flat.tensors))
            if same and not entry.compared and entry.uses < 3:
                return None
            if not (entry.trusted or same and entry.compared) or entry.is_due(_epoch(module)):
                self._compare(module, batch, inputs, entry, same, losses)
            elif entry.waits and not entry.compiled:
                entry.waits = False
            else:
                with failing(entry):
                    if not entry.compiled:
                        self.compilations += 1
                        entry.compile(module, inputs, self.options)
                    losses.append(entry.program.loss(inputs))
        return losses[0] if losses else None

    def step(self, module: Any, batch: Any, optimizer: Optimizer) -> FusedStep | None:
        """Return what takes whole steps on batches like this one, or None where there is none.

        It has begun: whoever asks for it finishes it.

        Raises:
            RuntimeError: When the loss cannot be compiled and ``strict`` is set.
        """
        with self._refusing():
            inputs = self._inputs(module, batch)
            entry = self._entry(module, inputs)
            self._catch_up(module, batch, inputs, entry)
            if entry.failed or not entry.trusted or entry.is_due(_epoch(module)):
                return None  # :meth:`loss` brings it nearer, or compares it
            with failing(entry):
                fused = self._fused(entry, optimizer, inputs)
            if fused is not None:
                fused.inputs = inputs
            return fused
        return None

    def _fused(self, entry: Entry, optimizer: Optimizer, inputs: StepInputs) -> FusedStep | None:
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
        if handlers_around():
            raise Untraceable("handlers of Pyro's stand around the call, which it would not see")
        if torch.is_anomaly_enabled():
            raise Untraceable("torch looks for anomalies, operation by operation")
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
            if error.kind not in self._warned:
                self._warned.add(error.kind)
                warn(
                    f"the loss is not compiled, and runs eagerly: {error}. Leave compile out, or "
                    "change the model; compile='strict' makes this an error.",
                    stacklevel=4,
                )

    def _entry(self, module: Any, inputs: StepInputs) -> Entry:
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
        made = Entry(inputs.key, module._guards(), reasons, label_of(inputs))
        made.go_on(self._expected.pop(made.label, None))
        self._entries.append(made)
        return made

    def _is_traced(self, module: Any, inputs: StepInputs, entry: Entry) -> bool:
        """Trace a batch shape that has come often enough; tells whether it was traced before."""
        if entry.program is not None:
            return True
        # The first is traced at once.
        if self.traces > 0 and entry.uses <= _PATIENCE:
            return False
        with failing(entry):
            if self.traces >= _MOST:
                names = f"other Python state ({', '.join(sorted(entry.new))})" * bool(entry.new)
                raise Exhausted(
                    f"{_MOST} traces have been made, and steps of {names or 'another shape'} have "
                    "none. Make what changes a tensor, such as a buffer, which compiled code reads "
                    "at each step, or batches of fewer sizes"
                )
            self.traces += 1
            entry.trace(module, inputs)
        return False

    def _compare(
        self,
        module: Any,
        batch: Any,
        inputs: StepInputs,
        entry: Entry,
        same: bool,
        losses: list[torch.Tensor],
    ) -> None:
        """Compare the recorded operations with eager, whose loss is the step's, at equal noise.

        Raises:
            Untraceable: When they differ; ``losses`` holds the loss of eager then, too.
        """
        program, schedule = entry.program, entry.schedule
        assert program is not None
        steps, epoch = program.steps, _epoch(module)
        parameters = trained(module)
        with failing(entry):
            found = of_graph(module, program, inputs, parameters)
        program.steps = steps  # that was none
        losses.append(module._run(batch).loss)  # whose errors are the user's
        expected = of_eager(losses[0], parameters)
        if schedule is None:
            with failing(entry):
                compare(found, expected, "a trace")
        else:
            try:
                compare(found, expected, "a trace", entry.largest)
            except Untraceable:
                self._start_anew(module, entry, steps - schedule.last)
        entry.compared = True
        entry.largest = max(entry.largest, largest_gradient(expected))
        if schedule is not None:
            schedule.done(steps, epoch)
        elif not same:
            entry.schedule, entry.traced_on = Schedule(steps, epoch), []

    def _start_anew(self, module: Any, entry: Entry, steps: int) -> None:
        """Have a trace that no longer holds made anew, or leave it for good."""
        entry.failed, entry.anew = entry.anew, True
        entry.uses = _PATIENCE
        entry.begin(module._guards())
        raise Unseen(
            "it has come to differ from eager at the same random numbers, so that up to "
            f"{steps} steps before this one were wrong: model or guide read something that has "
            "changed and is not watched, such as a long list or array, an object of a library, "
            "or a file. Make it a tensor, such as a buffer"
            + ("" if entry.failed else "; it is traced anew")
        )


def _epoch(module: Any) -> int | None:
    trainer = module._trainer
    return None if trainer is None else int(trainer.current_epoch)
