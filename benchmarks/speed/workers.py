"""Methods in processes of their own, which wait for their turns."""

import multiprocessing
import os
import threading
import traceback
from collections import deque
from pathlib import Path
from typing import Any

from benchmarks.speed import job as jobs
from benchmarks.speed.clock import Stopped
from benchmarks.speed.methods import Method

PATIENCE = 240  # seconds, after which a method that sends nothing has failed
PRELOADED = ["numpy", "torch", "pyro", "lightning.pytorch", "rich", "pyro_lightning"]


def set_environment(threads: int, device: str) -> None:
    """Set, before the first process starts, how many threads each library may use, and where."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["JAX_PLATFORMS"] = device
    if threads == 1:
        os.environ["XLA_FLAGS"] = (
            "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )


def context() -> Any:
    """Processes forked from one that has imported what all need, but computed nothing."""
    ctx = multiprocessing.get_context("forkserver")
    ctx.set_forkserver_preload(PRELOADED)
    return ctx


def _work(
    pipe: Any, terminal: str, method: Method, key: str, data: Path, options: dict[str, Any]
) -> None:
    """What the process does: load the data, then run the method until the clock stops it."""
    screen = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
    for stream in (1, 2):
        os.dup2(screen, stream)
    os.environ.update(options.pop("environment"))
    try:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(options.pop("threads"))
        clock = options.pop("clock")(pipe)
        run = method.load()
        job = jobs.load(key, data, **options)
        clock.start()
        run(job, clock, **method.options)
    except Stopped:
        pass
    except BaseException:
        pipe.send(traceback.format_exc())


class Failed(RuntimeError):
    """A method raised; the message holds its traceback."""


class Worker:
    """A method in a process of its own, at a pseudo-terminal as wide as a user's.

    Progress bars draw as they would for a user; what they draw is read here and thrown away, on
    another core if there is one.
    """

    def __init__(
        self, ctx: Any, method: Method, key: str, data: Path, options: dict[str, Any]
    ) -> None:
        self.method = method
        self._shown: deque[bytes] = deque(maxlen=20)
        master, slave = os.openpty()
        os.environ.setdefault("TERM", "xterm-256color")
        name = os.ttyname(slave)
        self.pipe, theirs = ctx.Pipe()
        arguments = (theirs, name, method, key, data, options)
        self.process = ctx.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._fds = (master, slave)
        threading.Thread(target=self._read, args=(master,), daemon=True).start()

    def _read(self, master: int) -> None:
        try:
            while part := os.read(master, 65536):
                self._shown.append(part)
        except OSError:
            pass  # the terminal is closed: the worker has ended

    def receive(self, patience: float = PATIENCE) -> Any:
        """Wait for what its clock sends next; raise where it sent an error, died, or hangs."""
        try:
            if not self.pipe.poll(patience):
                raise Failed(f"{self.method.key}: nothing for {patience:.0f} s")
            found = self.pipe.recv()
        except EOFError:
            shown = b"".join(self._shown).decode(errors="replace")
            raise Failed(f"{self.method.key}: the process died\n{shown[-2000:]}") from None
        if isinstance(found, str):
            raise Failed(f"{self.method.key}:\n{found}")
        return found

    def turn(self, seconds: float) -> Any:
        """Let it run for so long."""
        self.pipe.send(seconds)
        return self.receive(PATIENCE + seconds)

    def stop(self) -> None:
        try:
            self.pipe.send(None)
            self.process.join(2)
        except OSError:
            pass  # it has failed, and said so
        self.process.kill()
        self.process.join()
        for fd in self._fds:
            os.close(fd)
