"""The private names of Pyro and torch that compilation leans on, each with a test of its own."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from pyro.infer.util import Dice
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from torch import _inductor
from torch.distributions import Distribution
from torch.fx import GraphModule, Node
from torch.fx.experimental import proxy_tensor


def particle_losses(
    elbo: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Iterator[tuple[Any, Any]]:
    """Yield the loss and the surrogate of each particle, each a tensor or a number.

    They are what ``differentiable_loss`` and ``loss`` of ``Trace_ELBO``, ``TraceMeanField_ELBO`` and
    ``TraceEnum_ELBO`` add up. Those look for NaN in between, in the backward pass too, which a
    trace cannot follow; whoever calls this must look for it.
    """
    for model_trace, guide_trace in elbo._get_traces(model, guide, args, kwargs):
        if isinstance(elbo, TraceEnum_ELBO):
            loss = -_compute_dice_elbo(model_trace, guide_trace)
            yield (loss.detach() if isinstance(loss, torch.Tensor) else loss), loss
        else:
            yield elbo._differentiable_loss_particle(model_trace, guide_trace)


def expects_yes() -> bool:
    """Whether the value of a tensor is asked for by a check that a step without errors passes.

    Those of distributions made beforehand, which validate whatever the settings are later; and
    that of Pyro's sum over enumerated sites, which leaves out draws of probability 0, so that
    ``0 * inf`` does not become NaN. Told that there are none, it gives the same sum, or NaN.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in _FILES:
        frame = frame.f_back
    return frame is not None and frame.f_code in _CHECKS


_CHECKS = {
    Dice.compute_expectation.__code__,
    Distribution.__init__.__code__,
    Distribution._validate_sample.__code__,
}
_FILES = {code.co_filename for code in _CHECKS}


def make_graph(fn: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> GraphModule:
    """Run a function of tensors once, and return the graph of the operations that it did."""
    graph: GraphModule = proxy_tensor.make_fx(fn)(*inputs)
    return graph


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
        return torch.compile(graph, **{"fullgraph": True, "dynamic": False, **options})
    fallback = {"fallback_random": True, "reorder_for_peak_memory": False}
    known = _inductor.list_options()
    chosen = {name: value for name, value in fallback.items() if name in known}
    return _inductor.compile(graph, list(inputs), options=chosen)
