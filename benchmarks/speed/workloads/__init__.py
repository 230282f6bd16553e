"""What is trained: five models, each written once for Pyro and once for NumPyro."""

from benchmarks.speed.workloads import effects, flights, linear, logistic, vae
from benchmarks.speed.workloads.base import Workload

WORKLOADS: dict[str, Workload] = {
    workload.key: workload
    for workload in (
        linear.WORKLOAD,
        logistic.WORKLOAD,
        vae.WORKLOAD,
        effects.WORKLOAD,
        flights.WORKLOAD,
    )
}
