"""When compiled code that is trusted is compared with eager again."""

from typing import Any

# Steps between two comparisons: they double, as long as nothing is found.
_FIRST, _LONGEST = 16, 10_000
_EARLY = 16  # comparisons that the start of an epoch calls for, however short epochs are
_EPOCH = 2_000  # steps since the last comparison, after which it does so later on


class Schedule:
    """Tells when a comparison is due: in the first step of an epoch, and after so many steps.

    Callbacks change what a model reads as an epoch starts. A comparison takes as long as a hundred
    compiled steps of a small model, so that short epochs do without once there have been some. It
    is steps that are counted, and no time, so that the same seed gives the same numbers.

    Attributes:
        last: The count of steps at the last comparison.

    Example:
        >>> schedule = Schedule(steps=0, epoch=0)
        >>> schedule.due(15, epoch=0), schedule.due(16, epoch=0), schedule.due(1, epoch=1)
        (False, True, True)
    """

    def __init__(self, steps: int, epoch: int | None) -> None:
        self.last = steps
        self._epoch = epoch
        self._interval = _FIRST
        self._count = 0

    def due(self, steps: int, epoch: int | None) -> bool:
        """Whether to compare, before a step.

        Args:
            steps: The count of compiled steps.
            epoch: The Trainer's, where there is one.
        """
        since = steps - self.last
        starts = epoch != self._epoch and (self._count < _EARLY or since >= _EPOCH)
        return starts or since >= self._interval

    def done(self, steps: int, epoch: int | None) -> None:
        """Take note of a comparison that found nothing."""
        if steps - self.last >= self._interval:
            self._interval = min(2 * self._interval, _LONGEST)
        self.last, self._epoch = steps, epoch
        self._count += 1

    def kept(self) -> list[int | None]:
        """Return what :meth:`of` makes an equal one of."""
        return [self.last, self._epoch, self._interval, self._count]

    @classmethod
    def of(cls, kept: list[Any]) -> "Schedule":
        """Make a schedule of what :meth:`kept` returned."""
        last, epoch, interval, count = kept
        made = cls(last, epoch)
        made._interval, made._count = interval, count
        return made
