"""Orders in which an epoch visits rows, made chunk by chunk."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

CHUNK = 2**16  # rows of an order that are made at once
LARGEST_TABLE = 2**24  # rows up to which a permutation is kept as a table, of 4 bytes a row
ROUNDS = 8

Rows = np.ndarray[Any, np.dtype[np.int64]]


def in_order(size: int, generator: torch.Generator | None = None) -> Iterator[Rows]:
    """Yield the rows 0, 1, ... in chunks.

    Example:
        >>> list(in_order(3))
        [array([0, 1, 2])]
    """
    for start in range(0, size, CHUNK):
        yield np.arange(start, min(start + CHUNK, size))


def shuffled(
    size: int, generator: torch.Generator, largest_table: int = LARGEST_TABLE
) -> Iterator[Rows]:
    """Yield every row once in random order, in chunks.

    Up to ``largest_table`` rows this is torch's permutation, each order as likely as any other, and
    a table of 4 bytes a row; above, it is a :class:`KeyedPermutation`, whose memory is that of the
    square root of the rows.

    Example:
        >>> rows = np.concatenate(list(shuffled(5, torch.Generator().manual_seed(0))))
        >>> sorted(rows.tolist())
        [0, 1, 2, 3, 4]
    """
    if size <= largest_table:
        order = torch.randperm(size, generator=generator, dtype=torch.int32)
        for start in range(0, size, CHUNK):
            yield order[start : start + CHUNK].long().numpy()
    else:
        permutation = KeyedPermutation(size, generator)
        for positions in in_order(size):
            yield permutation(positions)


class KeyedPermutation:
    """A random one-to-one map of [0, N) onto itself, computed where it is asked for.

    The rows are laid out on a grid of about sqrt(N) by sqrt(N) cells. Eight rounds of a Feistel
    network move each cell along one axis and then along the other, by a step that a random table
    holds for its place on the axis that stays; a cell beyond N goes through once more. With rounds
    that are truly random, as these tables are, few positions are as good as random ones; the whole
    order is one of far fewer than N! (8 sqrt(N) random numbers choose it).

    Source: J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (its
    generalised Feistel network and cycle walking).

    Args:
        size: N.
        generator: Where the tables are drawn from; equal states give equal maps.

    Example:
        >>> permutation = KeyedPermutation(10, torch.Generator().manual_seed(0))
        >>> sorted(permutation(np.arange(10)).tolist())
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self.height = math.isqrt(size - 1) + 1
        self.width = -(-size // self.height)
        axes = [(self.height, self.width), (self.width, self.height)] * (ROUNDS // 2)
        self._tables = [
            torch.randint(steps, (places,), generator=generator, dtype=torch.int32).numpy()
            for steps, places in axes
        ]

    def __call__(self, positions: Rows) -> Rows:
        """Map positions, ``(n,)`` integers in [0, N), to rows."""
        rows = self._once(positions)
        while (beyond := np.flatnonzero(rows >= self.size)).size:
            rows[beyond] = self._once(rows[beyond])
        return rows

    def _once(self, cells: Rows) -> Rows:
        rows = cells // self.width
        # 32 bits: half the memory to move, and sqrt(N) fits.
        low = (cells - rows * self.width).astype(np.int32)
        high = rows.astype(np.int32)
        for move_high, move_low in zip(self._tables[::2], self._tables[1::2], strict=True):
            high += move_high.take(low)
            high -= (high >= self.height) * np.int32(self.height)
            low += move_low.take(high)
            low -= (low >= self.width) * np.int32(self.width)
        return high.astype(np.int64) * self.width + low


class InBlocks:
    """Yields every row once, from a few blocks of neighbouring rows at a time, in chunks.

    Blocks are put in random order; the rows of ``together`` blocks are shuffled and used up before
    those of the next are touched, so that a disk reads long stretches, each of them once. Where
    blocks begin is drawn anew each epoch. More than 2^18 rows are shuffled by a
    :class:`KeyedPermutation`.

    A batch of B rows then mixes ``W (1 - (1 - 1/W)^B)`` of W = ``together`` blocks on average.
    Within them its rows are a simple random sample; the blocks are one of all blocks. With S^2 the
    variance of a quantity over all rows, and V that of its mean over blocks, a batch's mean has
    variance ``(S^2 - V / W) / B + V / W`` about, against ``S^2 / B`` of :func:`shuffled`. V is
    ``S^2 / block`` for rows in no order, and of the size of S^2 for a file that is sorted.

    Args:
        block: Rows of a block.
        together: W, blocks that are mixed.

    Example:
        >>> order = InBlocks(block=2, together=2)(6, torch.Generator().manual_seed(0))
        >>> sorted(np.concatenate(list(order)).tolist())
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, block: int, together: int) -> None:
        self.block, self.together = block, together

    def __call__(self, size: int, generator: torch.Generator) -> Iterator[Rows]:
        count = -(-size // self.block)
        shift = int(torch.randint(size, (), generator=generator))
        order = torch.randperm(count, generator=generator)
        # Groups of equal length: a short last one would mix few blocks.
        for group in order.tensor_split(-(-count // self.together)):
            # In ascending order, so that the one block that may be short is the last of its group.
            starts = np.sort(group.numpy()) * self.block
            rows = len(starts) * self.block - max(0, int(starts[-1]) + self.block - size)
            # No large table: training would wait for it in the middle of an epoch.
            for part in shuffled(rows, generator, 2**18):
                block = part // self.block
                moved = part + (starts - np.arange(len(starts)) * self.block + shift)[block]
                moved[moved >= size] -= size
                yield moved
