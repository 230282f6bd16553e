"""Fits in processes that are forked from one with all imports done, and killed as they run."""

import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback

import torch
from support import free_port

torch.set_num_threads(1)  # before any thread of a pool is there, which a fork would not have


class Life:
    """One or two processes of a fit, which counts its steps where the parent sees them."""

    def __init__(self, run, world=1):
        self.counter = mmap.mmap(-1, 16)
        port = free_port()
        self.processes = [self._fork(run, rank, world, port) for rank in range(world)]

    def _fork(self, run, rank, world, port):
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            if world > 1:  # as torchrun sets them, so that Lightning starts no process
                names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"
                values = rank, rank, world, world, port
                os.environ.update(zip(names, map(str, values), strict=True))
                os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="lives")
            run(self)
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 7
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def steps(self):
        """Steps that were begun, and whether the fit has begun."""
        return struct.unpack("qq", self.counter[:])

    def count(self, steps):
        self.counter[:] = struct.pack("qq", steps, 1)

    def wait_for(self, steps, seconds=60):
        """Wait until steps were begun since the fit went on; whether that came."""
        first, end = None, time.monotonic() + seconds
        while time.monotonic() < end and self.alive():
            now, begun = self.steps
            if begun:
                first = now if first is None else first
                if now >= first + steps:
                    return True
            time.sleep(0.0005)
        assert time.monotonic() < end, "the fit does not get on"
        return False

    def linger(self, seconds, steps):
        """Wait for a time, or until so many more steps were begun."""
        last, end = self.steps[0] + steps, time.monotonic() + seconds
        while time.monotonic() < end and self.steps[0] < last:
            time.sleep(0.0005)

    def alive(self):
        return not os.waitid(os.P_PID, self.processes[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def send(self, number, only=None):
        """Send a signal to all processes at one moment, or to one of them."""
        if only is not None:
            os.kill(self.processes[only], number)
            return
        # Stopped first: one that runs on would meet the end of the other, and fail by itself.
        for each in (signal.SIGSTOP, number, signal.SIGCONT):
            for process in self.processes:
                os.kill(process, each)

    def end(self):
        """Wait for the end; returns what each process exits with, minus its signal if killed."""
        codes = [os.waitpid(process, 0)[1] for process in self.processes]
        return [os.waitstatus_to_exitcode(code) for code in codes]


def killed_often(run, kills, seed, world=1):
    """Kill a fit at random moments and start it again, until it was killed so often.

    Returns how often it was killed, and how many steps it had begun in each life.
    """
    chance = random.Random(seed)
    lives = []
    while len(lives) < kills:
        life = Life(run, world)
        if life.wait_for(chance.randint(1, 8)):
            # In this step or the next: on a fast machine a time alone would be many of them, and
            # the fit over before it was killed so often.
            life.linger(chance.uniform(0, 0.02), steps=1)
            life.send(signal.SIGKILL)
        steps = life.steps[0]
        codes = life.end()
        if set(codes) != {-signal.SIGKILL}:
            break
        lives.append(steps)
    return lives
