"""Rows of a table of parameters, with a gradient of these rows alone."""

from typing import Any

import torch


class _GatherRows(torch.autograd.Function):
    """Rows of a table, whose gradient is sparse: no step costs O(N)."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape, ctx.dim = table.shape, dim
        return table.index_select(dim, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        indices = rows[None]
        if ctx.dim:
            left = [torch.arange(n, device=rows.device) for n in ctx.shape[: ctx.dim]]
            indices = torch.cartesian_prod(*left, rows).T
        values = grad.reshape(-1, *ctx.shape[ctx.dim + 1 :])
        # index_select has checked the rows.
        grad = torch.sparse_coo_tensor(indices, values, ctx.shape, check_invariants=False)
        return grad, None, None


def gather_rows(table: torch.Tensor, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Take rows of a table along a dimension; the gradient to the table is sparse.

    Example:
        >>> table = torch.zeros(1000, 2, requires_grad=True)
        >>> gather_rows(table, torch.tensor([3, 7])).sum().backward()
        >>> table.grad.is_sparse, table.grad.coalesce().indices()
        (True, tensor([[3, 7]]))
    """
    if is_taken(table):
        return table
    taken: torch.Tensor = _GatherRows.apply(table, rows, dim)  # type: ignore[no-untyped-call]
    return taken


def mark_taken(rows: torch.Tensor) -> torch.Tensor:
    """Mark a tensor as rows that were taken of a table already, which stand in its place."""
    rows._pyro_lightning_taken = True  # type: ignore[attr-defined]
    return rows


def is_taken(table: torch.Tensor) -> bool:
    """Whether a tensor is rows of a table already."""
    return getattr(table, "_pyro_lightning_taken", False)


def missing_rows(holder: str, plate: str) -> str:
    """Say that a guide needs row numbers, and where they come from.

    Args:
        holder: What has parameters of each row.
        plate: The data plate.
    """
    return (
        f"{holder} in the data plate '{plate}'), and the batch does not tell which rows it holds. "
        "Use ArrayDataModule, wrap your training data set in IndexedDataset(dataset), or call with "
        "IndexedBatch(batch, rows)."
    )
