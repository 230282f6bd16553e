"""A refusal of parameters that a row reads by its place in the batch."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyro_lightning.analytic_kl import point_of
from pyro_lightning.params import shown_name
from pyro_lightning.reads_data import repeated_latents, repeated_row, row_dim
from pyro_lightning.reruns import Handled, run_again
from pyro_lightning.rows import ChosenBatch, IndexedBatch, data_of
from pyro_lightning.shapes import ShortenedValues
from pyro_lightning.structure import SEE_TABLE

# Of equal rows that do not differ, rounding leaves less than this.
_OF_ITSELF, _OF_THE_LARGEST = 1e-3, 1e-6


def check_places(
    module: Any,
    batch: IndexedBatch,
    handled: Handled,
    sites: Sequence[list[Any]],
    plates: Collection[str],
) -> None:
    r"""Check that no row reads a parameter by its place in the batch.

    Its entries would be those of whatever rows stand there. Where every row of the batch is the
    first, with latents of the same values, all rows have one density as a function of such
    parameters as serve, and so

    .. math:: \sum_i w_i \nabla_\theta \log p(x_i, z_i) = 0 \quad \text{where} \quad
        \sum_i w_i = 0

    Only parameters with a dimension of B or of all rows are looked at, and only a batch of two
    rows to all rows but one.

    Args:
        module: A ``PyroSVIModule``.
        batch: A batch of it, with row numbers.
        handled: What keeps the parameters of model and guide the module's own.
        sites: Messages of the sites of one run of the model, and of one of the guide.
        plates: Names of the plates over the rows of a batch.

    Raises:
        ValueError: Naming the parameter.
    """
    rows = module.num_rows(data_of(batch))
    sizes = {module._known_size(), module._count_rows()}
    served = module._row_parameters()
    suspects = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
        and name not in served
        and not sizes.union([rows]).isdisjoint(parameter.shape)
    }
    if not suspects or rows == 1 or rows in sizes:
        return
    try:
        with _running_statistics(module):
            found = _compared(list(_densities(module, batch, handled, sites, plates)), suspects)
    except (ValueError, RuntimeError):
        # A batch of equal rows is not the user's, and may be one that no model takes.
        return
    for name in found:
        raise ValueError(
            f"parameter '{shown_name(name)}' (shape {tuple(suspects[name].shape)}) is read by the "
            "place of a row in the batch: entry i by whatever row comes i-th. The row numbers that "
            "`with pyro.plate(...) as i` gives count within the batch, 0 to B-1. For parameters "
            "of each row write pyro.param(name, value of all N rows, event_dim=...) inside the "
            "data plate, with batches that tell their rows (ArrayDataModule, IndexedDataset); or "
            "let the batch hold its row numbers, read the parameter at these, and give them to the "
            "plate: pyro.plate(..., N, subsample=rows); or compute it from the row by a network. "
            f"{SEE_TABLE}"
        )


@contextmanager
def _running_statistics(module: nn.Module) -> Iterator[None]:
    """Have BatchNorm use its running statistics.

    Equal rows have no variance, and what it makes of them is their rounding, many times larger.
    """
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
    changed = [each for each in module.modules() if isinstance(each, kinds) and each.training]
    for each in changed:
        each.training = False
    try:
        yield
    finally:
        for each in changed:
            each.training = True


def _densities(
    module: Any,
    batch: IndexedBatch,
    handled: Handled,
    sites: Sequence[list[Any]],
    plates: Collection[str],
) -> Iterator[torch.Tensor]:
    """Log-density of each row where all rows are the first, for sites that are not noisy."""
    data = data_of(batch)
    rows = module.num_rows(data)
    alike = repeated_row(data, rows, rows)
    # Parameters of each row are read at one row, too.
    batch = ChosenBatch(alike, batch.rows[:1].expand(rows))
    for part, ran in zip((module.model, module.guide), sites, strict=True):
        values = repeated_latents(ran, plates)
        runs = []
        for seed in range(2):
            held = ShortenedValues(values)
            met = run_again(module, part, batch, handled, held, seed=seed, gradient=True)
            runs.append({s["name"]: _by_row(s, plates, rows) for s in met.sites})
        for name, one in runs[0].items():
            other = runs[1].get(name)
            # Noise within the model, such as dropout, makes rows differ by itself.
            if one is not None and other is not None and torch.allclose(one, other, equal_nan=True):
                yield one


def _by_row(site: Any, plates: Collection[str], rows: int) -> torch.Tensor | None:
    """Sum a site's log-density, or the point that it is, for each row."""
    dim = row_dim(site, plates)
    if dim is None or site["infer"].get("_deterministic"):
        return None
    point = point_of(site["fn"])
    if point is None:
        value = site["fn"].log_prob(site["value"])
    else:
        value, dim = point.v, dim - site["fn"].event_dim
    if value.dim() < -dim or value.shape[dim] != rows or not value.requires_grad:
        return None
    by_row: torch.Tensor = value.movedim(dim, 0).reshape(rows, -1).sum(1)
    return by_row


def _compared(densities: list[torch.Tensor], suspects: Mapping[str, nn.Parameter]) -> list[str]:
    """Name the parameters on which rows that are equal do not depend alike."""
    if not densities:
        return []
    weights = torch.linspace(-1.0, 1.0, len(densities[0])).to(densities[0])
    parameters = list(suspects.values())
    totals = (
        torch.stack([(each * by).sum() for each in densities]).sum()
        for by in (weights, weights.abs())
    )
    unequal, all_alike = (
        torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        for total in totals
    )
    sizes = [0.0 if g is None else _largest(g) for g in all_alike]
    return [
        name
        for name, gradient, size in zip(suspects, unequal, sizes, strict=True)
        if gradient is not None
        and size > _OF_THE_LARGEST * max(sizes)
        and _largest(gradient) > _OF_ITSELF * size
    ]


def _largest(gradient: torch.Tensor) -> float:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    found = float(dense.abs().max()) if dense.numel() else 0.0
    return found if found == found else 0.0  # a gradient that is no number tells nothing
