"""When compiled code that is trusted is compared with eager again."""

import time

# Steps between two comparisons: they double, as long as nothing is found.
_FIRST, _LONGEST = 16, 1000
_ALWAYS = 16  # comparisons that are made whatever they take
_SHARE = 0.01  # of the time, which those that follow may take


class Schedule:
    """Tells when a comparison is due: in the first step of an epoch, and after so many steps.

    Callbacks change what a model reads as an epoch starts. A comparison takes as long as many
    compiled steps: after the first few there are as many as take a hundredth of the time.

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
        self._spent = 0.0
        self._began = time.monotonic()

    def due(self, steps: int, epoch: int | None) -> bool:
        """Whether to compare, before a step.

        Args:
            steps: The count of compiled steps.
            epoch: The Trainer's, where there is one.
        """
        if epoch == self._epoch and steps - self.last < self._interval:
            return False
        if self._count < _ALWAYS:
            return True
        return self._spent <= _SHARE * (time.monotonic() - self._began)

    def done(self, steps: int, epoch: int | None, seconds: float) -> None:
        """Take note of a comparison that found nothing."""
        if steps - self.last >= self._interval:
            self._interval = min(2 * self._interval, _LONGEST)
        self.last, self._epoch = steps, epoch
        self._count += 1
        self._spent += seconds
