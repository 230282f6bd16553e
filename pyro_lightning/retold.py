"""Errors told once more, with where they arose."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import WrapperDescriptorType
from typing import NoReturn

_HERE = os.path.dirname(__file__)


class _Message(str):
    """The message of a KeyError, which shows the ``repr`` of what it is given."""

    __repr__ = str.__str__


def retell(error: Exception, where: str, more: str = "") -> NoReturn:
    """Raise an error of the same class, whose message says where it arose.

    A class with a constructor of its own cannot be made from a message: such an error is raised as
    it is, with a note (before Python 3.11, with one more argument).

    Args:
        error: What was raised; the cause of the new one.
        where: What stands before its message.
        more: What stands after it.

    Example:
        >>> try:
        ...     retell(IndexError("index 5 is out of range"), "batch 3 of epoch 0")
        ... except IndexError as error:
        ...     print(error)
        batch 3 of epoch 0: index 5 is out of range
    """
    made = _made(error, where, more)
    if made is not None:
        try:
            raise made from error
        finally:
            # Its traceback holds this frame: a cycle would keep a loader's workers waiting.
            del made, error
    if sys.version_info >= (3, 11):
        error.add_note(where + more)
    else:
        error.args = (*error.args, where + more)
    raise error


def brief(error: Exception) -> str:
    """Return class and message of an error, of a traceback from a worker its last line.

    Example:
        >>> brief(ValueError("Caught ValueError in a worker. Traceback:\\nValueError: no such row"))
        'ValueError: no such row'
    """
    name, lines = type(error).__name__, str(error).strip().splitlines()
    last = lines[-1] if lines else ""
    return last if len(lines) > 1 and last.startswith(name) else f"{name}: {last}"


def _made(error: Exception, where: str, more: str) -> Exception | None:
    kind, args = type(error), error.args
    own = not isinstance(kind.__init__, WrapperDescriptorType) or kind.__str__ not in _BUILT_IN
    if own:
        return None
    if isinstance(error, OSError) and len(args) > 1:
        text = f"{where}: {error.strerror}{more}"
        made: Exception = kind(error.errno, text, error.filename, None, error.filename2)
    elif len(args) == 1 and isinstance(args[0], str):
        text = f"{where}: {args[0]}{more}"
        made = kind(_Message(text) if isinstance(error, KeyError) else text)
    else:
        return None
    made.__dict__.update(error.__dict__)
    return made


_BUILT_IN = (Exception.__str__, KeyError.__str__, OSError.__str__)


def is_foreign(error: Exception) -> bool:
    """Whether an error was raised outside this package: by a user's code, Pyro or torch."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or not trace.tb_frame.f_code.co_filename.startswith(_HERE)


@contextmanager
def telling(where: str) -> Iterator[None]:
    """Add to errors where they arose."""
    try:
        yield
    except Exception as error:
        retell(error, where)
