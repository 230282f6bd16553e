"""Docstrings for mkdocstrings: their roles and formulas in Markdown."""

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([^`]+)`")
_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Write roles as code, and ``.. math::`` as a block of TeX."""
    text = _ROLE.sub(r"`\1`", text)
    return _MATH.sub(lambda m: f"{m[1]}$$\n{m[1]}{_joined(m[2])}\n{m[1]}$$", text)


def _joined(lines: str) -> str:
    return " ".join(dedent(lines).split("\n")).strip()


class RstDocstrings(Extension):
    """Rewrites each docstring that is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
