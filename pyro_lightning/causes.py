"""Why a loss is not compiled, told by kind and by the line of the user's code."""

import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro_lightning.tracing import Untraceable


class Exhausted(Untraceable):
    """Says that there are as many traces as may be."""

    kind = "exhausted"


class Unseen(Untraceable):
    """Says that a trace no longer held when it was compared anew."""

    kind = "unseen"


@contextmanager
def failing(entry: Any) -> Iterator[None]:
    """Let a batch shape stay eager from its first failure on."""
    try:
        yield
    except Exception as error:
        entry.failed = True
        # Whatever tracing and compiling meet, the eager loss serves, and the cause is told.
        if isinstance(error, Exhausted):
            raise
        kind = "" if isinstance(error, Untraceable) else f"{type(error).__name__}: "
        raise Untraceable(f"{kind}{error}{_where(error)}") from error


_NOT_THE_USERS = (os.path.dirname(__file__), sysconfig.get_paths()["stdlib"], "<")


def _where(error: Exception) -> str:
    """Name the last line of the user's own code that an error came through."""
    lines = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS) and "site-packages" not in frame.filename
    ]
    return f" (at {lines[-1]})" if lines else ""
