"""What is known of the steps of one batch shape: its trace, and how far that is trusted."""

from collections.abc import Mapping
from typing import Any

import torch

from pyro_lightning._upstream import compile_graph
from pyro_lightning.audits import Schedule
from pyro_lightning.compared import compare, of_program, trained
from pyro_lightning.fused import FusedStep
from pyro_lightning.guards import Guard, changed, guards_of_values, renewed
from pyro_lightning.program import Program, StepInputs
from pyro_lightning.states import drawing_in_python, preserved_generators, preserved_state
from pyro_lightning.tracing import Untraceable


class Entry:
    """A batch shape with the Python state of its steps.

    Args:
        key: What a trace takes for constant.
        guards: The Python state.
        new: The places that made it another entry.
        label: What tells it from others in a checkpoint.
    """

    def __init__(self, key: Any, guards: list[Guard], new: set[str], label: str) -> None:
        self.key, self.new, self.label = key, new, label
        self.uses = 0
        self.failed = False
        self.anew = False  # traced a second time, since something had changed unseen
        self.record: dict[str, Any] | None = None  # of the fit that goes on, until it is as far
        self.begin(guards)

    def begin(self, guards: list[Guard]) -> None:
        """Forget a trace."""
        self.guards = [guard for guard in guards if not guard.moves]
        self.moving = [guard for guard in guards if guard.moves]
        self.program: Program | None = None
        self.traced_on: list[torch.Tensor] = []
        self.compared = False
        self.schedule: Schedule | None = None  # there is one once it is compared on another batch
        self.largest = 0.0
        self.compiled = False
        self.fused: FusedStep | None = None
        self.optimizer: Any = None
        self.made = 0
        self.waits = False  # for a step that is compiled whole
        self.began: int | None = None  # the epoch in which it was traced to catch up

    @property
    def trusted(self) -> bool:
        """Whether it was compared on another batch than the one that it was traced on."""
        return self.schedule is not None

    def is_due(self, epoch: int | None) -> bool:
        """Whether it is to be compared with eager in this step."""
        if self.schedule is None or self.program is None:
            return False
        return self.schedule.due(self.program.steps, epoch)

    def parameters_changed(self) -> str | None:
        """Say so when parameters are of another kind than in the trace."""
        fits = self.program is None or self.program.fits()
        return None if fits else "requires_grad or type of parameters"

    # -- the trace -------------------------------------------------------------------------------

    def trace(self, module: Any, inputs: StepInputs) -> None:
        """Record the operations of a step, of which nothing outside may change as it runs."""
        self.moving = renewed(self.moving)
        _refuse_changes(self.moving)  # an iterator is never the same, and cannot be put back
        generators = [guard.read.args[0] for guard in self.moving]  # type: ignore[attr-defined]
        with preserved_state(module), preserved_generators(generators):
            drew = drawing_in_python()
            self.program = Program(module, inputs)
            drawn = drew()
            _refuse_changes(self.moving)
        if drawn:
            raise Untraceable(
                "the model draws from Python's or NumPy's random numbers, which would be the same "
                "at each step: draw from torch's"
            )
        _refuse_changes(self.guards)
        self.guards += guards_of_values(self.program.traced.read)
        self.traced_on = [tensor.clone() for tensor in inputs.flat.tensors]

    def compile(self, module: Any, inputs: StepInputs, options: Mapping[str, Any]) -> None:
        """Compile the trace, and compare the two."""
        program = self.program
        assert program is not None
        parameters = trained(module)
        steps = program.steps
        expected = of_program(module, program, inputs, parameters)
        program.run = compile_graph(program.traced.graph, program.example(inputs), options)
        compare(of_program(module, program, inputs, parameters), expected, "compiled code")
        program.steps = steps  # these were none
        self.compiled = True

    # -- checkpoints -----------------------------------------------------------------------------

    def kept(self) -> dict[str, Any]:
        """Return how far it is, for a checkpoint."""
        if self.record is not None and self.program is None:
            return self.record
        return {
            "uses": self.uses,
            "anew": self.anew,
            "traced": self.program is not None,
            "compared": self.compared,
            "schedule": None if self.schedule is None else self.schedule.kept(),
            "steps": 0 if self.program is None else self.program.steps,
            "largest": self.largest,
        }

    def go_on(self, record: dict[str, Any] | None) -> None:
        """Count on from where a checkpoint stands."""
        if record is not None:
            self.uses, self.anew = record["uses"], record["anew"]
            self.record = record if record["traced"] else None

    def caught_up(self) -> None:
        """Take the place that a trace had, since this one is equal to eager, too."""
        record, self.record = self.record, None
        assert record is not None and self.program is not None
        self.compared, self.program.steps = True, record["steps"]
        self.largest = max(self.largest, record["largest"])
        if not record["compared"]:
            self.schedule = Schedule(self.program.steps, self.began)
        elif record["schedule"] is not None:
            self.schedule = Schedule.of(record["schedule"])
        if self.schedule is not None:
            self.traced_on = []


def _refuse_changes(guards: list[Guard]) -> None:
    name = changed(guards)
    if name is not None:
        raise Untraceable(f"the model changes '{name}' as it runs")


def label_of(inputs: StepInputs) -> str:
    """Describe a batch shape, without anything of what is in the batch.

    Example:
        >>> from pyro_lightning.inputs import flatten
        >>> flat = flatten([torch.zeros(4, 2)])
        >>> label_of(StepInputs(flat, 4, None, key=None, kind=(4, 100)))
        "(4, 100) [((4, 2), (2, 1), 'float32')]"
    """
    kinds = [
        (tuple(each.shape), each.stride(), str(each.dtype).removeprefix("torch."))
        for each in inputs.flat.tensors
    ]
    return f"{inputs.kind} {kinds}"
