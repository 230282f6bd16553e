"""The rest of an epoch: a loader that goes on after the batches that are done."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


class Rest:
    """What comes after the first ``done`` items of an iteration, once; then all of it.

    The first items are taken and left out, so that whatever draws random numbers for them draws
    the same. Of a sampler they are row numbers: no data is read.

    Args:
        items: What is iterated over, such as a batch sampler.
        done: How many items are left out of the first iteration.

    Example:
        >>> rest = Rest(range(4), done=3)
        >>> list(rest), list(rest)
        ([3], [0, 1, 2, 3])
    """

    def __init__(self, items: Any, done: int) -> None:
        self.items, self.done = items, done
        self._current: Iterator[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        # Of a sampler: Lightning sets its epoch, and asks a batch sampler for it.
        if name == "items" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.items, name)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> "Rest":
        self._current = iter(self.items)
        return self

    def __next__(self) -> Any:
        self.skip()
        assert self._current is not None
        return next(self._current)

    def skip(self) -> bool:
        """Take the items that are done now, not with the next one; False before it is iterated."""
        if self._current is None:
            return False
        while self.done:
            self.done -= 1
            next(self._current, None)
        return True

    # Lightning warns of loaders without these that their epoch will begin anew.

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: whoever made this knows the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def draws_rows(loader: Any) -> bool:
    """Whether a loader's rows come from a sampler, which can be asked without reading data."""
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def rest_of(loader: Any, done: int) -> tuple[Any, Rest]:
    """Return a loader of the batches after the first ``done``, and what skips these.

    A loader with a sampler is copied, data set, workers' options and all, and its batches are
    skipped at the sampler; any other is read, and its first batches are thrown away. The loader
    itself is left as it is.

    Args:
        loader: A loader of batches.
        done: How many batches are left out.

    Example:
        >>> rest, _ = rest_of(DataLoader(range(5), batch_size=2), done=1)
        >>> list(rest)
        [tensor([2, 3]), tensor([4])]
    """
    if not draws_rows(loader):
        rest = Rest(loader, done)
        return rest, rest
    copied = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    rest = Rest(getattr(loader, name), done)
    # In the dictionary: torch refuses to set these once a loader is made, and a copy is.
    copied.__dict__.update({name: rest, "state_dict": rest.state_dict})
    copied.__dict__["load_state_dict"] = rest.load_state_dict
    if loader.persistent_workers:
        # Workers that persist are those of the loader, whose seed was drawn before the epoch.
        copied.__dict__.update(_iterator=None, generator=torch.Generator())
    return copied, rest


def samplers_of(loader: Any) -> list[Any]:
    """List the samplers of a loader, each once."""
    batches = getattr(loader, "batch_sampler", None)
    found: dict[int, Any] = {}
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        if sampler is not None:
            found.setdefault(id(sampler), sampler)
    return list(found.values())


def generators_of(loader: Any) -> list[torch.Generator]:
    """List the generators that a loader and its samplers have of their own, each once.

    Example:
        >>> generator = torch.Generator()
        >>> loader = DataLoader(range(5), shuffle=True, generator=generator)
        >>> len(generators_of(loader)), generators_of(DataLoader(range(5), shuffle=True))
        (1, [])
    """
    found: dict[int, torch.Generator] = {}
    for owner in (loader, *samplers_of(loader)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found.setdefault(id(generator), generator)
    return list(found.values())


def seeds_of(loader: Any) -> list[int]:
    """List the seeds of samplers that have one, as ``DistributedSampler`` has."""
    return [sampler.seed for sampler in _seeded(loader)]


def set_seeds(loader: Any, seeds: list[int]) -> None:
    """Put back what :func:`seeds_of` returned."""
    for sampler, seed in zip(_seeded(loader), seeds, strict=True):
        sampler.seed = seed


def _seeded(loader: Any) -> list[Any]:
    return [each for each in samplers_of(loader) if type(getattr(each, "seed", None)) is int]
