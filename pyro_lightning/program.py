"""One traced loss of a module: its inputs, and its use in place of the eager loss."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from torch import nn

from pyro_lightning._upstream import multiplied, without_onednn
from pyro_lightning.closures import LONGEST
from pyro_lightning.gather import gather_rows, mark_taken
from pyro_lightning.inputs import Flat, flatten
from pyro_lightning.masked_latents import OPEN
from pyro_lightning.rows import checked_rows, data_of
from pyro_lightning.tracing import Traced, Untraceable, trace_loss


class StepInputs(NamedTuple):
    """What a step's loss depends on.

    Attributes:
        flat: The arguments of model and guide.
        batch_size: B.
        rows: Row numbers, ``(B,)``, where there are parameters of each row.
        key: What a trace takes for constant, hashable.
        kind: What of it is the same in another process, and is nothing of the user's data.
    """

    flat: Flat
    batch_size: int
    rows: torch.Tensor | None
    key: Any
    kind: Any


def step_inputs(module: Any, batch: Any) -> StepInputs:
    """Read what the loss of a batch depends on, apart from parameters and Python state.

    Raises:
        Untraceable: When a batch holds something else than tensors and constants.
        ValueError: When its row numbers cannot be.
    """
    data = data_of(batch)
    size = module.num_rows(data)
    flat = flatten(module.model_inputs(data), "the model's (args, kwargs)")
    rows = None
    if module._keeps_rows:
        rows = checked_rows(batch, size, module._count_rows(), module._source)
    device = flat.tensors[0].device.type if flat.tensors else "cpu"
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    n = module._known_size()
    masks = tuple(sorted(module._masks.items()))
    # A trace holds the tensor of a weight itself, and reads what it is filled with.
    weight = module._kl_scale
    kind = size, n, rows is None, masks, autocast, torch.get_default_dtype(), weight is None
    return StepInputs(flat, size, rows, (flat.structure, id(weight), *kind), kind)


class Program:
    """The loss of a module and its gradients, as a function of tensors.

    Args:
        module: A ``PyroSVIModule`` whose parameters exist.
        inputs: Those of the step that it is traced on.

    Raises:
        Untraceable: Saying why there is none.
    """

    def __init__(self, module: Any, inputs: StepInputs) -> None:
        tensors = inputs.flat.tensors
        self._device = tensors[0].device if tensors else torch.device("cpu")
        tables = module._per_row() if inputs.rows is not None else []
        unsettled = [name for name, state in module._masks.items() if state == OPEN]
        if unsettled:
            raise Untraceable(
                f"the mask of latent '{unsettled[0]}' has left nothing out so far, so that it is "
                "not known yet what becomes of its entries"
            )
        if module._per_row() and inputs.rows is None:
            raise Untraceable("the guide's own create_plates says which rows a batch holds")
        self.tables = list({id(t.parameter): t for t in tables}.values())
        taken = {id(table.parameter) for table in self.tables}
        self._slots = slots = _slots(module)
        self._dense = [s for s in slots if s.tensor.requires_grad and id(s.tensor) not in taken]
        self._fixed = [s for s in slots if not s.tensor.requires_grad and id(s.tensor) not in taken]
        by_id = {id(slot.tensor): slot for slot in slots}
        read = [*self._dense, *(by_id[id(table.parameter)] for table in self.tables), *self._fixed]

        def loss_of(free: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
            for rows in free[len(self._dense) :]:
                mark_taken(rows)
            left = iter(others)
            state = [*free, *(next(left) for _ in self._fixed)]
            args, kwargs = inputs.flat.rebuilt(left)
            with _swapped(read, state):
                return module._bare_loss(args, kwargs, inputs.batch_size)  # type: ignore[no-any-return]

        free, others = self._values(inputs)
        known = {id(p) for p in (*module.parameters(), *module.buffers())}
        recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
        # oneDNN's LSTM passes a tensor to its derivative that does not exist while traced.
        with pyro.validation_enabled(False), without_onednn() if recurrent else nullcontext():
            self.traced: Traced = trace_loss(loss_of, free, others)
        if {id(p) for p in (*module.parameters(), *module.buffers())} != known:
            raise Untraceable("parameters or buffers were made while the loss was traced")
        self._refuse_second_references()
        self.run: Callable[..., Any] = self.traced.graph
        self.steps = 0

    def _refuse_second_references(self) -> None:
        """Refuse constants that are parameters or buffers: they would have no gradient."""
        own = {slot.tensor.data_ptr(): slot for slot in self._slots if slot.tensor.numel()}
        for constant in self.traced.constants:
            dense = constant.layout == torch.strided and constant.numel()
            slot = own.get(constant.data_ptr()) if dense else None
            if slot is not None:
                raise Untraceable(
                    f"the model reads its parameter or buffer '{slot.places[0][1]}' by a second "
                    "reference, which a trace cannot follow: read it where it is registered, as by "
                    "self.parameters()"
                )

    def fits(self) -> bool:
        """Whether parameters and buffers are of the kinds that were traced, at the same places."""
        for slot in self._slots:
            now = slot.now()
            if now is None or slot.kind != _kind(now):
                return False
            if len(slot.places) > 1 and any(_at(held, key) is not now for held, key in slot.places):
                return False
        return True

    def _values(self, inputs: StepInputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what the loss is differentiated by, and what else it reads."""
        free = [slot.now() for slot in self._dense]
        for table in self.tables:
            assert inputs.rows is not None
            free.append(
                gather_rows(table.parameter, inputs.rows.to(table.parameter.device), table.dim)
            )
        return free, [*self.fixed(), *inputs.flat.tensors]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What the loss is differentiated by: parameters, and tables of which it reads rows."""
        return [*(slot.now() for slot in self._dense), *(table.parameter for table in self.tables)]

    def fixed(self) -> list[torch.Tensor]:
        """Parameters that do not train, and buffers."""
        return [slot.now().detach() for slot in self._fixed]

    def example(self, inputs: StepInputs) -> list[torch.Tensor]:
        """Return the inputs of the graph, for a compiler to look at."""
        free, others = self._values(inputs)
        return [*(p.detach() for p in free), *others, *self.traced.constants]

    def loss(self, inputs: StepInputs, run: Callable[..., Any] | None = None) -> torch.Tensor:
        """Compute the loss, by another form of the graph if given.

        It is differentiable once, by the parameters of the module.
        """
        free, others = self._values(inputs)
        used = [p for p, is_used in zip(free, self.traced.used, strict=True) if is_used]
        values = [*(p.detach() for p in free), *others, *self.traced.constants]
        with self.without_autocast():
            self.begin_step()
            loss = _Compiled.apply(run or self.run, values, *used)  # type: ignore[no-untyped-call]
        return loss  # type: ignore[no-any-return]

    def begin_step(self) -> None:
        """Count a step, and tell CUDA graphs that the last one's results may be overwritten."""
        self.steps += 1
        if self._device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def without_autocast(self) -> Any:
        """Make the context in which the graph runs, which holds autocast's conversions itself."""
        if torch.is_autocast_enabled(self._device.type):
            return torch.autocast(self._device.type, enabled=False)
        return nullcontext()


class _Compiled(torch.autograd.Function):
    """Hands the gradients that a graph computed with its loss to autograd."""

    @staticmethod
    def forward(ctx: Any, run: Any, values: Any, *used: torch.Tensor) -> torch.Tensor:
        loss, *ctx.grads = run(*values)
        # CUDA graphs write the next step's loss to the same place; autograd takes the gradients
        # before that.
        return loss.clone() if loss.is_cuda else loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError(
                "a compiled loss has first derivatives only, and create_graph=True asks for the "
                "second: leave compile out"
            )
        return None, None, *multiplied(ctx.grads, grad)


class _Slot(NamedTuple):
    """Where a module holds a parameter or buffer, which may be replaced there."""

    tensor: torch.Tensor
    kind: Any
    places: list[tuple[Any, Any]]

    def now(self) -> Any:
        holder, key = self.places[0]
        return holder.get(key)


def _at(holder: Any, key: Any) -> Any:
    if isinstance(holder, dict):
        return holder.get(key)
    return holder[key] if key < len(holder) else None


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.requires_grad, tensor.dtype, tensor.device, tensor.shape


def _slots(module: nn.Module) -> list[_Slot]:
    found: dict[int, _Slot] = {}
    for part in module.modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    slot = found.setdefault(id(tensor), _Slot(tensor, _kind(tensor), []))
                    slot.places.append((holder, key))
    for part in module.modules():
        # Lists of parameters, such as the flat weights of torch's recurrent layers.
        for held in vars(part).values():
            if type(held) is list and len(held) <= LONGEST:
                for number, tensor in enumerate(held):
                    if id(tensor) in found:
                        found[id(tensor)].places.append((held, number))
    return list(found.values())


@contextmanager
def _swapped(slots: Sequence[_Slot], tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Hold other tensors in the places of a module's own.

    ``torch.func.functional_call`` would leave them in a module that is reached by two names.

    Raises:
        Untraceable: When something else is there in the end.
    """
    starts = [tensor.data_ptr() for tensor in tensors]
    for slot, tensor in zip(slots, tensors, strict=True):
        for holder, key in slot.places:
            holder[key] = tensor
    assigned = []
    try:
        yield
    finally:
        for slot, tensor, start in zip(slots, tensors, starts, strict=True):
            if tensor.data_ptr() != start or any(_at(h, k) is not tensor for h, k in slot.places):
                assigned.append(str(slot.places[0][1]))
            for holder, key in slot.places:
                if isinstance(holder, dict) or key < len(holder):
                    holder[key] = slot.tensor
    if assigned:
        raise Untraceable(
            f"the model assigns its parameter or buffer '{assigned[0]}' as it runs: change it in "
            f"place, as by self.{assigned[0]}.copy_(...)"
        )
