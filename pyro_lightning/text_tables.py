"""Tables as text, and as tables of Rich."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Printed(NamedTuple):
    """What is printed: a table, and lines below it."""

    headings: Sequence[str]
    cells: Iterable[Sequence[str]]
    lines: Sequence[str]


class Printable:
    """Is printed as a table and lines below it, by ``print`` and by ``rich.print``."""

    def _printed(self) -> Printed:
        raise NotImplementedError

    def __str__(self) -> str:
        headings, cells, lines = self._printed()
        return "\n".join([text_table(headings, cells), *lines])

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> "Table":
        """Render as a table of rich, for ``rich.print``."""
        headings, cells, lines = self._printed()
        return rich_table(headings, cells, "\n".join(lines))


def text_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Set cells in columns of equal width.

    Example:
        >>> print(text_table(["site", "sd"], [["intercept", "1"], ["w", "0.5"]]))
        site       sd
        intercept  1
        w          0.5
    """
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def rich_table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> "Table":
    """Make a table of Rich.

    Raises:
        ImportError: Where Rich is not installed, naming the extra.
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError(
            'this rendering needs rich: pip install "pyro-lightning[rich]"; print(table) '
            "needs nothing"
        ) from error
    table = Table(caption=caption or None)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
