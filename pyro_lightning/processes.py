"""Whether this process is one of several, and what all of them have."""

from typing import Any

from torch import distributed


def in_group() -> bool:
    """Whether this process is in a group of torch's; a build of torch may have none."""
    return distributed.is_available() and distributed.is_initialized()


def everyones(mine: Any) -> list[Any]:
    """Return what each process has, in the order of ranks.

    Example:
        >>> everyones("mine")  # of one process
        ['mine']
    """
    if not in_group():
        return [mine]
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, mine)
    return found
