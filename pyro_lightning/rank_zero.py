"""Warnings that only the first of several processes gives."""

import warnings

from torch import distributed


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
    together = distributed.is_available() and distributed.is_initialized()
    if not together or distributed.get_rank() == 0:
        warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)
