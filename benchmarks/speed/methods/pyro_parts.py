"""Pyro's guides and optimizer settings for a workload, whoever runs them."""

from typing import Any

import torch
from pyro.infer import autoguide

from benchmarks.speed.job import Job


def adam_options(job: Job) -> dict[str, Any]:
    return {"lr": job.lr, "betas": job.workload.betas}


def tensors(job: Job) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array).to(job.device) for array in job.arrays)


def autoguide_of(job: Job, model: Any, **options: Any) -> Any:
    """The workload's autoguide of a model."""
    if job.workload.init_to_mean:
        options["init_loc_fn"] = autoguide.init_to_mean
    return getattr(autoguide, job.workload.guide)(model, **options)
