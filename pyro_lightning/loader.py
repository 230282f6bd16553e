"""The loader of arrays: batches of row numbers in, batches on their way to the device out."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from pyro_lightning.batches import map_tensors


class _OfBatchSampler:
    """An attribute of a loader that its batch sampler has.

    Beside a batch sampler torch sets these to what goes with none: rows in order, no batch size.
    Lightning looks at ``loader.sampler`` to see whether rows are shuffled, or shared out to ranks.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, loader: Any, owner: type | None = None) -> Any:
        return self if loader is None else getattr(loader.batch_sampler, self.name)

    def __set__(self, loader: Any, value: Any) -> None:
        pass


class RowLoader(DataLoader[Any]):
    """A ``DataLoader`` whose batch sampler hands on whole batches of row numbers.

    ``sampler``, ``batch_size`` and ``drop_last`` are those of the batch sampler. An epoch draws
    nothing from torch's default generator but what the sampler draws, so that the rows do not
    depend on the number of workers, nor on whether there is a validation.

    Args:
        dataset: A data set with ``__getitems__``, which makes whole batches.
        batch_sampler: Gives the rows of each batch.
        copy_to: A CUDA device that batches are copied to while the one before is used.
        **options: Of ``DataLoader``.
    """

    sampler = _OfBatchSampler()
    batch_size = _OfBatchSampler()
    drop_last = _OfBatchSampler()

    def __init__(
        self,
        dataset: Any,
        *,  # Lightning makes the loader anew, with another batch sampler by keyword
        batch_sampler: Any,
        copy_to: torch.device | None = None,
        **options: Any,
    ) -> None:
        # An iterator of torch's draws a seed for its workers, but workers that persist only once.
        options.setdefault("generator", torch.Generator())
        options.setdefault("collate_fn", as_is)
        super().__init__(dataset, batch_sampler=batch_sampler, **options)
        self.copy_to = copy_to

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.copy_to is None else copied_ahead(batches, self.copy_to)


def as_is(batch: Any) -> Any:
    """Return what a data set made as a whole batch."""
    return batch


def copied_ahead(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """Yield batches on a CUDA device, each copied there while the one before it is used.

    The copies run on a stream of their own; Lightning's run on that of the computation, and wait
    for it. They overlap where batches are pinned.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(batch: Any) -> tuple[Any, Any]:
        with torch.cuda.stream(stream):
            moved = map_tensors(batch, lambda t: t.to(device, non_blocking=True))
        return moved, stream.record_event()

    def arrived(moved: Any, copied: Any) -> Any:
        computing = torch.cuda.current_stream(device)
        computing.wait_event(copied)

        def used(tensor: torch.Tensor) -> torch.Tensor:
            # Else its memory could serve the next copy before this stream is done with it.
            tensor.record_stream(computing)
            return tensor

        return map_tensors(moved, used)

    waiting = None
    for batch in batches:
        ahead = start(batch)
        if waiting is not None:
            yield arrived(*waiting)
        waiting = ahead
    if waiting is not None:
        yield arrived(*waiting)
