"""Tables as text, and as tables of Rich."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


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
