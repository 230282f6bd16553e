"""NumPyro: a jitted ``svi.update`` fed by the host, and ``lax.scan`` over an epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax, random
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO, autoguide

from benchmarks.speed.clock import Clock
from benchmarks.speed.job import Job


class Steps:
    """NumPyro's SVI of a workload; a batch is its row numbers and its columns."""

    def __init__(self, job):
        self.job, self.parts = job, job.workload.numpyro(job.constants)
        work = job.workload
        if work.guide:
            options = {"create_plates": self.plate} if work.local else {}
            if work.init_to_mean:
                options["init_loc_fn"] = numpyro.infer.init_to_mean
            guide = getattr(autoguide, work.guide)(self.model, **options)
        else:
            guide = self.guide
        rate = job.lr if job.decay == 1 else lambda step: job.lr * job.decay**step
        self.svi = SVI(self.model, guide, numpyro.optim.Adam(rate, *work.betas), Trace_ELBO())

    def plate(self, rows, *columns):
        # The plate is given its rows: drawing them would cost O(N) a step.
        with handlers.substitute(data={"data": rows}):
            return numpyro.plate("data", self.job.rows, subsample_size=len(rows))

    def model(self, rows, *columns):
        latents = self.parts.prior()
        with self.plate(rows):
            self.parts.likelihood(latents, *columns)

    def guide(self, rows, *columns):
        with self.plate(rows):
            self.parts.variational(*columns)

    def batch(self, columns, rows):
        return rows, *(column[rows] for column in columns)

    def init(self):
        rows = jnp.arange(self.job.batch_size)  # a plate takes no NumPy array
        return self.svi.init(random.key(0), *self.batch(self.job.arrays, rows))

    def medians(self, state):
        return self.svi.guide.median(self.svi.get_params(state))

    @property
    def whole_batches(self):
        """Full batches of an epoch; a smaller last one, a shape of its own, is left out."""
        return self.job.rows // self.job.batch_size


def update(job: Job, clock: Clock) -> None:
    """``jit(svi.update)``, each batch cut by NumPy from an order shuffled each epoch."""
    steps = Steps(job)
    state = steps.init()
    # Donated, so that updates are in place: without it W4 would copy N parameters.
    step = jax.jit(steps.svi.update, donate_argnums=0)
    clock.sync = lambda: jax.block_until_ready(state)
    clock.medians = lambda: steps.medians(state)
    rng, count, size = np.random.default_rng(0), 0, job.batch_size
    while True:
        order = rng.permutation(np.arange(job.rows, dtype=np.int32))
        for start in range(0, steps.whole_batches * size, size):
            state, _ = step(state, *steps.batch(job.arrays, order[start : start + size]))
            count += 1
            clock.tick(count)


def scan(job: Job, clock: Clock, host_order: bool = False) -> None:
    """``lax.scan`` over an epoch, data on the device; its order drawn by JAX, or by NumPy."""
    steps = Steps(job)
    state = steps.init()
    columns = jax.device_put(job.arrays)
    used = steps.whole_batches * job.batch_size

    def epoch(state, columns, order):
        def one(state, rows):
            return steps.svi.update(state, *steps.batch(columns, rows))

        return lax.scan(one, state, order[:used].reshape(-1, job.batch_size))

    def shuffled_epoch(state, columns, key):
        return epoch(state, columns, random.permutation(key, job.rows))

    step = jax.jit(epoch if host_order else shuffled_epoch, donate_argnums=0)
    clock.sync = lambda: jax.block_until_ready(state)
    clock.medians = lambda: steps.medians(state)
    rng, key, count = np.random.default_rng(0), random.key(1), 0
    while True:
        if host_order:
            order = rng.permutation(np.arange(job.rows, dtype=np.int32))
        else:
            key, order = random.split(key)
        state, _ = step(state, columns, order)
        jax.block_until_ready(state)
        count += steps.whole_batches
        clock.tick(count)
