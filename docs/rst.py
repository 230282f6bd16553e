"""Docstrings for mkdocstrings: their roles and formulas in Markdown."""

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_MATH = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Write roles as code, ``.. math::`` as a block of TeX, and name the section of code."""
    text = _ROLE.sub(r"`\1`", text)
    text = _EXAMPLE.sub(
        r"\1Examples:", text
    )  # the only name of a section of code that griffe knows
    return _MATH.sub(lambda m: f"{m[1]}$$\n{m[1]}{_joined(m[2])}\n{m[1]}$$", text)


def _joined(lines: str) -> str:
    return " ".join(line.strip() for line in lines.splitlines()).strip()


class RstDocstrings(Extension):
    """Rewrites each docstring that is read."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
