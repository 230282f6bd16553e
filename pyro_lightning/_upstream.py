"""The private names of Pyro, torch and jsonargparse that are leant on, each with its test."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from pyro.infer.util import Dice
from pyro.poutine import runtime
from pyro.util import warn_if_nan
from torch import _inductor, nn
from torch.distributions import Distribution
from torch.fx import GraphModule, Node
from torch.fx.experimental import proxy_tensor
from torch.optim import Optimizer
from torch.utils.data._utils.fetch import _MapDatasetFetcher


def answer_to_check() -> bool | None:
    """Answer a check that asks for the value of a tensor, and that a step without errors passes.

    Such are the validation of distributions made beforehand, which stays on whatever the settings
    are later; Pyro's warnings of NaN, in the backward pass too; and its sum over enumerated sites,
    which leaves out draws of probability 0 lest ``0 * inf`` become NaN: told that there are none,
    it gives the same sum, or NaN. Whoever runs a graph must look for NaN.

    Returns:
        The answer; None where something else asks.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in _FILES:
        frame = frame.f_back
    return None if frame is None else _CHECKS.get(frame.f_code)


_CHECKS = {
    Dice.compute_expectation.__code__: True,
    Distribution.__init__.__code__: True,
    Distribution._validate_sample.__code__: True,
    warn_if_nan.__code__: False,
}
_FILES = {code.co_filename for code in _CHECKS}


def handlers_around() -> bool:
    """Whether handlers of Pyro's stand around the code that asks."""
    return bool(runtime._PYRO_STACK)


def hook_tables(module: nn.Module) -> list[Mapping[int, Any]]:
    """Return the tables of hooks that run with the calls of a module."""
    return [
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ]


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether hooks of the user's run with the steps of an optimizer."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def multiplied(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Multiply tensors by a scalar one, in one call."""
    return tuple(torch._foreach_mul(list(tensors), factor))


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors to the places of others, in one call."""
    torch._foreach_copy_(targets, sources)  # type: ignore[arg-type]


@contextmanager
def without_onednn() -> Iterator[None]:
    """Have torch leave its kernels of oneDNN out.

    The public ``torch.backends.mkldnn.flags`` sets precisions as well, which warns of Intel GPUs.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def make_graph(fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> GraphModule:
    """Run a function of tensors once, and return the graph of the operations that it did."""
    graph: GraphModule = proxy_tensor.make_fx(fn)(*inputs)
    for node in graph.graph.find_nodes(op="call_function", target=_BERNOULLI):
        # Inductor's own bernoulli compares with single precision uniforms, which are other draws
        # in double precision. This one it leaves to eager's kernel.
        node.target, node.args = torch.ops.aten.bernoulli.Tensor, (node.args[0], node.args[0])
    graph.recompile()
    return graph


_BERNOULLI = torch.ops.aten.bernoulli.default


def traced_node(tensor: torch.Tensor) -> Node | None:
    """Return the node of the graph being made that a tensor came from; None for a constant."""
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    held = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None)
    return None if held is None else held.proxy.node


def untraced() -> Any:
    """Make the context in which operations are done without becoming part of the graph."""
    return proxy_tensor.disable_proxy_modes_tracing()


def compile_graph(
    graph: GraphModule, inputs: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a graph of operations, for inputs of these shapes, strides and devices.

    Without options of the user's it goes to inductor directly: ``torch.compile`` would look at
    every input again at each call, which takes as long as a small model does.
    """
    if options:
        # Its first use in a process turns the validation of distributions off, for good.
        validates = Distribution._validate_args
        try:
            return torch.compile(graph, **{"fullgraph": True, "dynamic": False, **options})
        finally:
            Distribution.set_default_validate_args(validates)
    fallback = {"fallback_random": True, "reorder_for_peak_memory": False}
    known = _inductor.list_options()
    # Random numbers in eager's order, so that a seed gives the same noise.
    chosen = {name: value for name, value in fallback.items() if name in known}
    return _inductor.compile(graph, list(inputs), options=chosen)  # type: ignore[no-any-return]


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether something is to be called with a parameter's gradient."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def open_records(path: str) -> None:
    """Open a file of ``torch.save`` as ``torch.load`` does, which reads its table alone.

    Raises:
        RuntimeError: When torch finds the table damaged; it is stricter than Python's zipfile.
    """
    torch._C.PyTorchFileReader(path)


def came_from_data(error: Exception) -> bool:
    """Whether a ``DataLoader`` met an error as it asked a map-style data set for rows.

    A ``StopIteration`` of a data set is one, which is else the end of a loader.
    """
    trace, fetch = error.__traceback__, _MapDatasetFetcher.fetch.__code__
    while trace is not None:
        if trace.tb_frame.f_code is fetch:
            return True
        trace = trace.tb_next
    return came_from_worker(error)


def came_from_worker(error: Exception) -> bool:
    """Whether an error is that of a batch which a worker of a ``DataLoader`` could not make.

    The worker goes on with the next, which it does not where it died or was waited for in vain.
    """
    message = str(error.args[0]) if error.args else ""
    return message.startswith("Caught ") and " in DataLoader worker process " in message


def class_made_by(factory: Any) -> Any:
    """Find what a factory makes an instance of: the function of a ``functools.partial``.

    A class path whose first arguments are left open, such as a guide's model, jsonargparse makes a
    partial of a function of its own, with the class as last of its arguments.
    """
    if not isinstance(factory, partial):
        return factory
    ours = getattr(factory.func, "__module__", None) or ""
    return factory.args[-1] if ours.split(".")[0] == "jsonargparse" else factory.func


def mask_of_distribution(fn: MaskedDistribution) -> bool | torch.Tensor:
    """Return the mask that a distribution was given by ``.mask``."""
    mask: bool | torch.Tensor = fn._mask
    return mask
