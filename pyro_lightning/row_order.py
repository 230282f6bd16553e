"""The rows of a loader in the order of their data set, and with their numbers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from pyro_lightning.rows import row_source
from pyro_lightning.sizes import row_sampler


def rows_in_order(loader: Any) -> Any:
    """Make a loader of the same rows in the order of the data set, none of them left out.

    What is no ``DataLoader`` of a map-style data set is returned as it is.

    Example:
        >>> import torch
        >>> shuffled = DataLoader(torch.arange(5), batch_size=2, shuffle=True, drop_last=True)
        >>> list(rows_in_order(shuffled))
        [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    rows: Any = range(len(loader.dataset))  # type: ignore[arg-type]
    sampler = row_sampler(loader)  # that of a batch sampler, too, of which `sampler` tells nothing
    if isinstance(sampler, SubsetRandomSampler):
        rows = sorted(sampler.indices)
    elif isinstance(sampler, list | tuple | range):
        rows = sorted(set(sampler))
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:  # batches of the user's own, or none
        return loader
    return DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=rows,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


@contextmanager
def numbering(loaders: Iterable[Any]) -> Iterator[None]:
    """Have data sets that can number their rows do so; they are as before afterwards."""
    switched = number_rows_(loaders)
    try:
        yield
    finally:
        for dataset in switched:
            dataset.row_numbers = False


def number_rows_(loaders: Iterable[Any], source: Any = None) -> list[Any]:
    """Have data sets, or the one of ``source``, number rows; returns those that did not before."""
    found = [each.dataset for each in map(row_source, loaders) if each is not None]
    switched = []
    for dataset in found:
        if not dataset.row_numbers and source in (None, dataset.source):
            dataset.row_numbers = True
            switched.append(dataset)
    return switched
