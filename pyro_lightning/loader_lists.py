"""One loader or several, as Lightning takes them."""

from collections.abc import Iterator, Mapping
from typing import Any


def each_loader(loaders: Any) -> Iterator[Any]:
    """Walk through one loader, several in lists, dicts or a ``CombinedLoader``, or none.

    Example:
        >>> list(each_loader({"a": "one", "b": ["two", "three"]}))
        ['one', 'two', 'three']
    """
    if loaders is None:
        return
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    # Lightning's CombinedLoader lists those that it was made of.
    loaders = getattr(loaders, "flattened", loaders)
    if not isinstance(loaders, tuple | list):
        yield loaders
        return
    for loader in loaders:
        yield from each_loader(loader)
