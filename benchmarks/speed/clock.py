"""Times a method that runs on and on, in chunks, so that methods can take turns."""

import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple


class Stopped(BaseException):
    """No more chunks are wanted; no method may take it for an error of its own."""


class Ready(NamedTuple):
    """A method is warm: seconds from its start to the end of its first steps, and to here."""

    first_steps: float
    warm: float


class Chunk(NamedTuple):
    """What a method did in its turn; ``cpu`` is the time of all threads of its process."""

    seconds: float
    cpu: float
    steps: int

    @property
    def microseconds(self) -> float:
        return 1e6 * self.seconds / self.steps


def _nothing() -> None:
    return None


class Clock:
    """Handed to a method, which calls ``tick`` after each step, or each few, until that raises.

    A tick costs well under a microsecond. When a chunk's time is over, the clock waits until the
    device has done all that it was given, reads the time, sends a ``Chunk`` and waits for its next
    turn; a waiting process takes no processor. Everything that happens from tick to tick counts:
    drawing batches, the end of an epoch and the permutation of the next, logging, progress bar.

    A method sets ``sync``, which waits for the device, and ``medians``, which returns those of the
    latents under its guide, where it has them.

    Args:
        pipe: Where chunks go, and where turns, in seconds, come from.
        warmup: Seconds that pass before the first turn.
        first_steps: How many steps are the first: code may be traced at one, compiled at the next.
    """

    def __init__(self, pipe: Connection, warmup: float, first_steps: int = 3) -> None:
        self.pipe, self.warmup, self.first_steps = pipe, warmup, first_steps
        self.sync: Callable[[], object] = _nothing
        self.medians: Callable[[], Mapping[str, Any]] = dict
        self._first: float | None = None
        self._warm = False
        self._until = 0.0
        self.start()

    def start(self) -> None:
        """Count the first step's seconds from here: data are loaded, nothing is built."""
        self._began = time.perf_counter()

    def tick(self, steps: int) -> None:
        """Note that so many steps have been taken since the start."""
        if steps and time.perf_counter() >= self._until:
            self._pause(steps)

    def _pause(self, steps: int) -> None:
        self.sync()
        now, cpu = time.perf_counter(), time.process_time()
        if self._first is None:
            if steps >= self.first_steps:
                self._first = now - self._began
                self._until = now + self.warmup
            return
        if self._warm:
            seconds, used = now - self._turn, cpu - self._cpu
            self.pipe.send(Chunk(seconds, used, steps - self._steps))
        else:
            self._warm = True
            self.pipe.send(Ready(self._first, now - self._began))
        budget = self.pipe.recv()
        if budget is None:
            raise Stopped
        self._turn, self._cpu, self._steps = time.perf_counter(), time.process_time(), steps
        self._until = self._turn + budget
