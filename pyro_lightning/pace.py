"""How fast a fit goes, and how long it will take."""

import math
from datetime import timedelta

_MEMORY = 10.0  # seconds after which what was counts for a third


class Pace:
    """Rows a second, of late, and seconds that are left.

    Args:
        now: The time, in seconds.

    Example:
        >>> pace = Pace(now=0.0)
        >>> pace.add(rows=100, now=2.0)
        >>> pace.add(rows=100, now=3.0)
        >>> pace.pause(now=9.0)  # a validation, whose time is none of the rows'
        >>> pace.add(rows=100, now=10.0)
        >>> round(pace.rows_per_second()), pace.left(batches=4)
        (77, 16.0)
    """

    def __init__(self, now: float) -> None:
        self._rows = self._seconds = 0.0
        self._last = now
        self._first: float | None = None
        self._batches = 0

    def add(self, rows: int, now: float) -> None:
        """Count a batch that is done."""
        taken = max(now - self._last, 0.0)
        kept = math.exp(-taken / _MEMORY)
        self._rows, self._seconds = kept * self._rows + rows, kept * self._seconds + taken
        self._last = now
        if self._first is None:
            self._first = now  # what comes before, as a compilation, will not come again
        else:
            self._batches += 1

    def pause(self, now: float) -> None:
        """Leave the time since the last batch out of the rows a second."""
        self._last = now

    def rows_per_second(self) -> float:
        """Return the rows a second; 0 before the first batch."""
        return self._rows / self._seconds if self._seconds else 0.0

    def left(self, batches: float) -> float | None:
        """Return the seconds that so many batches take, with validations in between as so far.

        None before two batches are done, and where there is no end.
        """
        if not self._batches or not math.isfinite(batches):
            return None
        assert self._first is not None
        return (self._last - self._first) / self._batches * max(batches, 0.0)


def clock(seconds: float) -> str:
    """Show seconds as hours, minutes and seconds.

    Example:
        >>> clock(3725.4)
        '1:02:05'
    """
    return str(timedelta(seconds=round(seconds)))
