"""Warnings and lines of a log that only the first of several processes gives."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from pyro_lightning.processes import in_group


def warn(message: str, *, stacklevel: int = 1) -> None:
    """Give a ``UserWarning``, once for all processes of a job.

    Each of them runs the same checks on rows of its own, and would say the same.

    Args:
        message: What is said.
        stacklevel: As that of ``warnings.warn``, counted from the caller.

    Example:
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     warn("look")
        >>> len(said)  # 0 on all ranks but the first
        1
    """
    if _is_first():
        warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)


@contextmanager
def first_rank_logs() -> Iterator[None]:
    """Let Pyro log what is no warning on the first process alone, as the depth of plates found.

    Example:
        >>> with first_rank_logs():  # WARNING on all ranks but the first
        ...     logging.getLogger("pyro").level == logging.INFO
        True
    """
    log = logging.getLogger("pyro")
    before = log.level
    try:
        if not _is_first():
            log.setLevel(max(before, logging.WARNING))
        yield
    finally:
        log.setLevel(before)


def _is_first() -> bool:
    return not in_group() or distributed.get_rank() == 0
