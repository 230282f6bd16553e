"""Sections of the README, and files, as parts of pages: a fact stands in one place.

A line ``{{ readme: Quick start }}`` of a page becomes the text under that heading of the README, up
to the next heading of its level; a line ``{{ file: examples/configs/visits.yaml }}`` that file.
"""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
_HERE = re.compile(r"^\{\{ readme: (.+?) \}\}$", re.MULTILINE)
_FILE = re.compile(r"^\{\{ file: (.+?) \}\}$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")


def section(text: str, name: str) -> str:
    """Find the text under a heading, without it.

    Raises:
        ValueError: When there is no such heading, or more than one.
    """
    blocks = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    # Comments in code look like headings.
    hidden = "".join(re.sub("#", "\0", b) if b.startswith("```") else b for b in blocks)
    found = list(re.finditer(rf"^(#+) {re.escape(name)}$", hidden, re.MULTILINE))
    if len(found) != 1:
        raise ValueError(f"the README has {len(found)} headings {name!r}, expected one")
    level, rest = len(found[0][1]), hidden[found[0].end() :]
    end = re.search(rf"^#{{1,{level}}} ", rest, re.MULTILINE)
    return rest[: end and end.start()].replace("\0", "#").strip()


def _linked(match: re.Match[str], up: str) -> str:
    path, anchor = match[1], match[2] or ""
    if path.startswith("docs/"):
        return f"]({up}{path.removeprefix('docs/')}{anchor})"
    return "]"  # what is no part of the site is named, without a link


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put sections and files in their place."""
    text = README.read_text(encoding="utf-8")
    up = "../" * page.file.src_uri.count("/")
    markdown = _HERE.sub(
        lambda here: _LINK.sub(lambda link: _linked(link, up), section(text, here[1])), markdown
    )
    return _FILE.sub(lambda here: _block(README.parent / here[1]), markdown)


def _block(path: Path) -> str:
    return f"```{path.suffix[1:]}\n{path.read_text(encoding='utf-8').rstrip()}\n```"
