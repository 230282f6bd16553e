"""What several tests share: a quiet Trainer, and models with a known posterior."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from pyro_lightning import PyroSVIModule

HERE = Path(__file__).parent


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    errors: str


def free_port() -> int:
    """A port of this machine that nobody has, nor is given before it is used.

    The system gives ports from 32768 on to whoever connects or asks for any; and each of the
    processes that run tests looks in a range of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(10_000 + 1000 * (worker % 20), 10_000 + 1000 * (worker % 20) + 1000)
    while True:
        port = random.SystemRandom().choice(ports)
        with socket.socket() as taken, suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port


def run_processes(
    name: str, folder: Path, *arguments: str, nodes: int = 1, timeout: float = 500
) -> list[Ended]:
    """Run a script of this folder, which starts processes; or one process of it for each node.

    A node's process finds in its environment what torchrun puts there.
    """
    # One thread a process: there are as many processes as cores.
    path_of_modules = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A seed that another test's command line has set, Lightning would set on all ranks.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path_of_modules}
    environment["PYTHONFAULTHANDLER"] = "1"  # for the stacks of a process that hangs
    environment["MASTER_PORT"] = str(free_port())
    started = []
    for node in range(nodes):
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "WORLD_SIZE": str(nodes),
            "RANK": str(node),
            "GROUP_RANK": str(node),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "TORCHELASTIC_RUN_ID": "test",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, str(HERE / name), *arguments],
                env={**environment, **(place if nodes > 1 else {})},
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    try:
        until = time.monotonic() + timeout
        errors = [each.communicate(timeout=until - time.monotonic())[1] for each in started]
    except subprocess.TimeoutExpired:
        _signal(started, signal.SIGABRT)
        stacks = "\n".join(each.communicate(timeout=30)[1] for each in started)
        pytest.fail(f"{name} has not ended after {timeout} s. It stands at:\n{stacks[-20_000:]}")
    finally:
        _signal(started, signal.SIGKILL)
    return [Ended(each.returncode, said) for each, said in zip(started, errors, strict=True)]


def _signal(started: list[Any], number: int) -> None:
    """Send a signal to processes, and to those that they have started."""
    for each in started:
        with suppress(ProcessLookupError):
            os.killpg(each.pid, number)


def run_script(name: str, folder: Path, *arguments: str, nodes: int = 1) -> Any:
    """Run a script of this folder that starts processes; returns the JSON that it writes.

    The script gets the path to write to, and the arguments.
    """
    path = folder / "found.json"
    for _ in range(4):
        ended = run_processes(name, folder, str(path), *arguments, nodes=nodes)
        # A process that ends while a thread of its gloo group still runs may be aborted by the C++
        # runtime, whatever it did; that is torch's, and says nothing of the script.
        if not any("terminate called without an active exception" in run.errors for run in ended):
            break
    for run in ended:
        assert run.code == 0, run.errors[-4000:]
    return json.loads(path.read_text())


# Lightning says so of every module with a validation step and a bare training loader.
no_validation = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer on the CPU that prints and writes nothing unless told to."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **options})


def normal_mean(x):
    """Mean of a Normal: prior N(0, 0.1), unit noise. Posterior N(sum(x) / (100 + N), ...)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


class RowNormal(dist.Normal):
    """A Normal whose draw is ``loc + scale * noise``: each row's noise is then its own."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return RowNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


class MixedModel(nn.Module):
    """Regression with a global intercept and a latent offset of each row, or one of them.

    ``plate`` makes the data plate from the batch, so that one model has it in every style.
    """

    def __init__(self, plate, latents=("global", "local")):
        super().__init__()
        self.plate, self.latents = plate, latents
        self.slope = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, y, noise, rows):
        loc = pyro.sample("intercept", dist.Normal(0.3, 0.5)) if "global" in self.latents else 0.0
        with self.plate(x, rows):
            if "local" in self.latents:
                loc = loc + pyro.sample("offset", dist.Normal(0.2 * x, 0.8))
            pyro.sample("y", dist.Normal(loc + self.slope * x, 0.6), obs=y)


class MixedGuide(nn.Module):
    """Guide of :class:`MixedModel`; the offset's parameters are computed from its row."""

    def __init__(self, plate, latents=("global", "local")):
        super().__init__()
        self.plate, self.latents = plate, latents
        self.loc = nn.Parameter(torch.tensor(0.1))
        self.log_scale = nn.Parameter(torch.tensor(-1.0))
        self.encoder = nn.Parameter(torch.tensor([0.4, -0.3]))

    def forward(self, x, y, noise, rows):
        if "global" in self.latents:
            pyro.sample("intercept", dist.Normal(self.loc, self.log_scale.exp()))
        if "local" in self.latents:
            loc = self.encoder[0] * (y - 0.5 * x)
            with self.plate(x, rows):
                pyro.sample("offset", RowNormal(loc, self.encoder[1].exp(), noise))


def mixed_rows(count):
    """Rows of :class:`MixedModel`: x, y, each row's noise, and its number."""
    generator = torch.Generator().manual_seed(7)
    x, y, noise = torch.randn(3, count, generator=generator)
    return x, y + x, noise, torch.arange(count)


class StepLosses(Callback):
    """Keeps what ``training_step`` returned at each step, drawn with the noise of one seed."""

    def __init__(self, seed=0):
        self.seed = seed
        self.batches: list[Any] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(self.seed)
        self.batches.append(batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())


def assert_equal_to_pyro(elbo, ours, theirs, arguments, dataset_size):
    """Compare values and every gradient; ``ours`` and ``theirs`` are pairs of model and guide."""
    svi = PyroSVIModule(*ours, elbo=elbo(), dataset_size=dataset_size)
    svi.loss(arguments)  # makes whatever is lazy
    parameters = list(svi.parameters())
    assert parameters
    torch.manual_seed(3)
    loss = svi.loss(arguments)
    torch.manual_seed(3)
    expected = elbo().differentiable_loss(*theirs, *arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    gradients, wanted = (
        torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected)
    )
    assert any(gradient is not None for gradient in wanted)
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=0)
    with torch.no_grad():
        torch.manual_seed(3)
        evaluated = svi.loss(arguments)
        torch.manual_seed(3)
        assert float(evaluated) == pytest.approx(elbo().loss(*theirs, *arguments), rel=1e-9)


def with_plate(part, plate):
    """The same module, parameters and all, with its plate in another style."""

    def run(*arguments):
        own, part.plate = part.plate, plate
        try:
            return part(*arguments)
        finally:
            part.plate = own

    return run
