"""Signals that wait until a step is over."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import distributed


class HeldSignals:
    """Keeps signals that arrive, and hands them to their handlers when asked to.

    A signal comes at any moment, in the middle of an update of parameters, say; what its handler
    does, to stop or to save, is right only between two steps. A second Ctrl-C is handed over at
    once.

    Example:
        >>> before = signal.signal(signal.SIGUSR1, lambda *_: print("saved"))
        >>> held = HeldSignals()
        >>> held.hold([signal.SIGUSR1])
        >>> signal.raise_signal(signal.SIGUSR1)
        >>> for number in held.arrived:
        ...     held.hand_over(number)
        saved
        >>> held.release()
        >>> _ = signal.signal(signal.SIGUSR1, before)
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[int] = []
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._process = 0
        self._told: Callable[[int], None] = lambda _: None

    def hold(self, signals: Iterable[int], told: Callable[[int], None] = lambda _: None) -> None:
        """Take the place of the handlers of signals; in the main thread, which alone has any.

        Args:
            signals: Which.
            told: Is called when one arrives.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._told = told
        self._process = os.getpid()
        for number in signals:
            self._handlers[number] = signal.signal(number, self._keep)

    @property
    def arrived(self) -> list[int]:
        """The signals that arrived and were not handed over."""
        return list(self._arrived)

    def ask(self, device: torch.device) -> None:
        """Begin to tell the signals that arrived to all processes, each of which must ask."""
        flags = torch.zeros(signal.NSIG, device=device)
        if self._arrived:
            flags[self._arrived] = 1
        work = distributed.all_reduce(flags, distributed.ReduceOp.MAX, async_op=True)
        self._asked = flags, work

    def answer(self) -> list[int]:
        """List the signals that any process had when all asked, in one order on all of them."""
        if self._asked is None:
            return []
        (flags, work), self._asked = self._asked, None
        work.wait()
        return flags.nonzero().flatten().tolist()

    def hand_over(self, number: int) -> None:
        """Run the handler that a signal would have had, whether or not it arrived here."""
        if number in self._arrived:
            self._arrived.remove(number)
        handler = self._handlers.get(number)
        if callable(handler):
            handler(number, None)

    def release(self) -> None:
        """Put the handlers back where no others have been put since."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._keep:
                signal.signal(number, handler)
        self._handlers, self._arrived, self._asked = {}, [], None

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a loader, forked from this process
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        elif number not in self._arrived:
            self._arrived.append(number)
            self._told(number)
        elif number == signal.SIGINT:
            self.hand_over(number)
