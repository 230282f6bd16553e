"""A loss and its gradients as one graph of tensor operations."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from pyro_lightning._upstream import answer_to_check, make_graph, traced_node, untraced


class Untraceable(Exception):
    """Says why a loss has no graph.

    Attributes:
        kind: What users are told once of each kind of.
    """

    kind = "trace"


class NotCompiled(RuntimeError):
    """Says why a loss is not compiled, where the user wants it compiled or not at all."""


class Traced(NamedTuple):
    """A loss and its gradients as a graph.

    Attributes:
        graph: Takes ``params``, ``others`` and ``constants``, one after the other; returns the loss
            and the gradients of the parameters that have one.
        constants: Tensors that are no inputs, which the graph reads each time.
        used: Whether the loss depends on each of the parameters.
        read: Tensors that are no inputs, of which Python has read values that now hold for good.
    """

    graph: GraphModule
    constants: list[torch.Tensor]
    used: list[bool]
    read: list[torch.Tensor]


def trace_loss(
    loss_of: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], torch.Tensor],
    params: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
) -> Traced:
    """Run a loss once, and keep the tensor operations of it and of its gradient.

    Loss and gradients are traced together: some of torch's functions have a derivative only outside
    a graph of their value alone. What is Python in the loss happens now, and never again.

    Args:
        loss_of: Computes a scalar from parameters and other tensors.
        params: What the loss is differentiated by.
        others: What it reads besides.

    Raises:
        Untraceable: When the loss looks at the value of a tensor that depends on its inputs, or
            makes one whose size is a matter of values.
    """
    used: list[bool] = []
    answers = _Answers()

    def both(*inputs: torch.Tensor) -> list[torch.Tensor]:
        free = [p.detach().requires_grad_() for p in inputs[: len(params)]]
        with torch.enable_grad(), answers:
            loss = loss_of(free, inputs[len(params) :])
        if not loss.requires_grad:
            raise Untraceable("the loss has no gradient")
        grads = torch.autograd.grad(loss, free, allow_unused=True)
        used.extend(grad is not None for grad in grads)
        return [loss.detach(), *(grad for grad in grads if grad is not None)]

    # Detached, so that a parameter that the loss has by itself is a constant, not an input.
    graph = make_graph(both, [*(p.detach() for p in params), *others])
    _refuse_sizes_of_values(graph)
    read = [*answers.read, *(_constant(graph, node) for node in answers.nodes)]
    constants = _lift_constants(graph)
    return Traced(graph, constants, used, read)


def _constant(graph: GraphModule, node: Node) -> torch.Tensor:
    return getattr(graph, str(node.target))  # type: ignore[no-any-return]


def _refuse_sizes_of_values(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.dynamic_output_shape not in tags or not _depends_on_inputs(node):
            continue
        # Indexing has the tag as well, for the masks among its indices.
        is_index = node.target is torch.ops.aten.index.Tensor
        kinds = {at.meta["val"].dtype for at in node.args[1] if at is not None} if is_index else ()
        if not is_index or torch.bool in kinds:
            raise Untraceable(
                f"{node.target} makes a tensor whose size depends on values of the batch: mask "
                "rows in place of taking them out"
            )


def _lift_constants(graph: GraphModule) -> list[torch.Tensor]:
    """Make inputs of the tensors that the graph holds, so that a change of theirs is seen."""
    held: dict[str, Node] = {}
    constants = []
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in held:
            with graph.graph.inserting_after(placeholders[-1]):
                held[name] = graph.graph.placeholder(f"constant_{len(held)}")
            placeholders.append(held[name])
            constants.append(getattr(graph, name))
        node.replace_all_uses_with(held[name])
        graph.graph.erase_node(node)
    for name in held:
        delattr(graph, name)
    graph.recompile()
    return constants


_VALUES = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.__contains__,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
    torch.Tensor.__dlpack__,
    torch.Tensor.untyped_storage,
    torch.Tensor.apply_,
    torch.Tensor.map_,
    torch.equal,
    torch.Tensor.equal,
    torch.allclose,
    torch.Tensor.allclose,
}
# What makes tensors of values; and the arguments of other functions whose values are read.
_MAKERS = {"tensor", "as_tensor", "asarray", "new_tensor"}
_READERS = {"tensor_split", "_pack_padded_sequence"}


class _Answers(TorchFunctionMode):
    """Answers what Python asks a tensor for, while a graph is made.

    The value of a constant is what it is. ``item()`` of anything else gives the tensor without
    gradient: Pyro's ELBOs add up such items.

    Attributes:
        read: Tensors from outside whose values were read.
        nodes: Such tensors that the graph holds, which other values were computed from.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []
        self.nodes: set[Node] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func is torch.Tensor.register_hook and answer_to_check() is False:
            return None  # a check of the gradient
        name = getattr(func, "__name__", "")
        if name in _MAKERS or name in _READERS:
            held = args[:1] if name in ("tensor", "as_tensor", "asarray") else args[1:]
            _refuse_values(name, held)
        if func not in _VALUES:
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if not any(_depends_on_inputs(traced_node(each)) for each in tensors):
            for each in tensors:
                self._keep(each)
            with untraced():
                return func(*args, **(kwargs or {}))
        if func is torch.Tensor.item:
            return tensor.detach()
        answer = answer_to_check()
        if func is torch.Tensor.__bool__ and answer is not None:
            return answer
        raise Untraceable(
            f"Tensor.{func.__name__}() of a tensor that depends on parameters, batch or random "
            "numbers: its value now would hold for all batches"
        )

    def _keep(self, tensor: torch.Tensor) -> None:
        node = traced_node(tensor)
        if node is None:
            self.read.append(tensor)
        else:
            # Numbers in the model's own code are copied as they become tensors.
            copied = {torch.ops.aten.lift_fresh_copy.default}
            self.nodes.update(
                each
                for each in _ancestors(node)
                if each.op == "get_attr" and {user.target for user in each.users} != copied
            )


def _refuse_values(name: str, held: Any) -> None:
    """Refuse what reads values of tensors where no operation shows it."""
    pending = list(held)
    while pending:
        value = pending.pop()
        if isinstance(value, (list, tuple)):
            pending.extend(value)
        elif isinstance(value, torch.Tensor) and _depends_on_inputs(traced_node(value)):
            # A tensor of a tensor is that tensor, or a copy.
            if name in ("as_tensor", "asarray") and value is held[0]:
                continue
            raise Untraceable(
                f"{name}() reads values of a tensor that depends on parameters, batch or random "
                "numbers: they would hold for all batches. torch.stack makes one of many tensors, "
                "clone() a copy"
            )


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
    # torch's own looks at the largest and smallest value, to check them.
    if num_classes < 0:
        raise Untraceable("one_hot without num_classes looks for the largest class of a batch")
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).long()


def _depends_on_inputs(node: Node | None) -> bool:
    return any(each.op == "placeholder" or _draws(each) for each in _ancestors(node))


def _ancestors(node: Node | None) -> Iterator[Node]:
    """Yield what a node is computed from, and itself."""
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at is not None and at not in seen:
            seen.add(at)
            yield at
            pending.extend(at.all_input_nodes)


def _draws(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags
