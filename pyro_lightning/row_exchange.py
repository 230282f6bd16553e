"""Gradients of rows, averaged over processes by sending the rows of their batches alone."""

import math
import operator
from collections.abc import Collection

import torch
from torch import distributed


def average_over_ranks_(parameters: Collection[torch.Tensor]) -> None:
    """Make sparse gradients the means over all ranks, sending the rows of the batches alone.

    DDP would send all N rows. Two collectives serve any number of parameters, since each of them
    waits for the slowest rank.
    """
    grads = [_sparse_grad(parameter) for parameter in parameters]
    if not grads:
        return
    world = distributed.get_world_size()
    mine = torch.tensor([grad.indices().shape[1] for grad in grads], device=grads[0].device)
    counts = [torch.empty_like(mine) for _ in range(world)]
    distributed.all_gather(counts, mine)
    packed = torch.cat([_bytes(part) for g in grads for part in (g.indices(), g.values() / world)])
    told = torch.stack(counts).tolist()  # once, since a GPU is waited for
    widths = [_bytes_of_a_row(grad) for grad in grads]
    # Collectives want equal shapes: the shorter ones are filled up.
    longest = max(sum(map(operator.mul, each, widths)) for each in told)
    packed = torch.cat([packed, packed.new_zeros(longest - packed.numel())])
    gathered = [torch.empty_like(packed) for _ in range(world)]
    distributed.all_gather(gathered, packed)
    found = [_unpacked(p, c, grads) for p, c in zip(gathered, told, strict=True)]
    for number, (parameter, grad) in enumerate(zip(parameters, grads, strict=True)):
        of_ranks = [parts[number] for parts in found]
        indices = torch.cat([indices for indices, _ in of_ranks], 1)
        values = torch.cat([values for _, values in of_ranks])
        averaged = torch.sparse_coo_tensor(indices, values, grad.shape, check_invariants=False)
        parameter.grad = averaged.coalesce()


def _sparse_grad(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad.coalesce()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _bytes_of_a_row(grad: torch.Tensor) -> int:
    values = grad.values()
    # Of an index for each sparse dimension, and of the entries of a row.
    return 8 * grad.sparse_dim() + math.prod(values.shape[1:]) * values.element_size()


def _unpacked(
    packed: torch.Tensor, counts: list[int], grads: list[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Read a rank's indices and values of each gradient."""
    found, start = [], 0
    for count, grad in zip(counts, grads, strict=True):
        middle = start + 8 * grad.sparse_dim() * count
        stop = start + _bytes_of_a_row(grad) * count
        # A copy begins where numbers of any size may.
        indices = packed[start:middle].clone().view(torch.int64)
        values = packed[middle:stop].clone().view(grad.dtype)
        shape = count, *grad.values().shape[1:]
        found.append((indices.reshape(grad.sparse_dim(), count), values.reshape(shape)))
        start = stop
    return found
