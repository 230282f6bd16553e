"""What keeps a fit on several processes alike on all of them, or ends it on all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Callback

from pyro_lightning._lightning import shares_of_rows
from pyro_lightning.noise import noise_of_rank
from pyro_lightning.processes import everyones
from pyro_lightning.rank_zero import warn
from pyro_lightning.row_ranks import RowsOnRanks
from pyro_lightning.sizes import knows_of_ranks
from pyro_lightning.uneven import EvenSteps

_Method = TypeVar("_Method", bound=Callable[..., Any])

_SERVED = (RowsOnRanks, EvenSteps)


def callbacks_of_ranks(trainer: Any) -> list[Callback]:
    """Make the callbacks that a Trainer of several processes needs and does not have."""
    held = {type(callback) for callback in trainer.callbacks}
    return [made() for made in _SERVED if trainer.world_size > 1 and made not in held]


def check_callbacks(trainer: Any) -> None:
    """Check that no hook of a subclass has left out the callbacks of several processes.

    Raises:
        RuntimeError: Saying what to write in the hook.
    """
    if callbacks_of_ranks(trainer):
        raise RuntimeError(
            "configure_callbacks of this subclass leaves out what several processes need. Let it "
            "return [*super().configure_callbacks(), ...]."
        )


def with_own_noise(method: _Method) -> _Method:
    """Make a method of the module draw other random numbers on each rank, in a Trainer's loops.

    Loaders and hooks draw what they would without us, and so does everything outside of fit,
    validate and test: after one seed ``posterior_samples`` gives the same draws on all ranks.
    """

    @wraps(method)
    def run(module: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = module._trainer
        if trainer is None or trainer.world_size == 1 or trainer.state.stage is None:
            return method(module, *args, **kwargs)
        python = module._draws_in_python
        with noise_of_rank(trainer.global_rank, trainer.world_size, module.device, python):
            return method(module, *args, **kwargs)

    return run  # type: ignore[return-value]


@contextmanager
def failing_together(trainer: Any) -> Iterator[None]:
    """Let an error of one rank be one of all, which would wait for it otherwise.

    Raises:
        RuntimeError: On ranks without an error of their own, with that of the first other one.
    """
    if trainer.world_size == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    said = everyones(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = {rank: message for rank, message in enumerate(said) if message is not None}
    if failed:
        rank, message = next(iter(failed.items()))
        raise RuntimeError(
            f"{len(failed)} of {len(said)} processes failed before the first step, though not this "
            f"one. Rank {rank} says: {message}"
        )


def compare_ranks(module: Any, loader: Any) -> None:
    """Check that all ranks know the same of the training data.

    Args:
        module: A ``PyroSVIModule`` in a Trainer, which knows N.
        loader: Its training loader, as the user gives it.

    Raises:
        ValueError: Where N differs, or where the loader has a length on some ranks only.
    """
    trainer = module.trainer
    if trainer.world_size == 1:
        return
    told = everyones((module.dataset_size, sized_len(loader) is not None))
    sizes, lengths = zip(*told, strict=True)
    if len(set(sizes)) > 1:
        raise ValueError(
            f"N, the number of training observations, differs between processes: "
            f"{', '.join(map(str, sizes))}. It is that of the whole training set, on each of them: "
            "PyroSVIModule(..., dataset_size=N), or an attribute dataset_size of the datamodule."
        )
    if len(set(lengths)) > 1:
        ranks = ", ".join(str(rank) for rank, known in enumerate(lengths) if not known)
        raise ValueError(
            f"the training loader has a len() on some processes and none on rank {ranks}, on which "
            "Lightning would wait for it. Give the same kind of loader on all."
        )
    _warn_of_parts(module, loader)


def _warn_of_parts(module: Any, loader: Any) -> None:
    """Warn where N is read from a loader whose rows nobody shares out, as from one of a part."""
    given = getattr(module.trainer.datamodule, "dataset_size", module._given_size)
    if given is None and shares_of_rows(module.trainer) is None and not knows_of_ranks(loader):
        warn(
            f"N = {module.dataset_size} is read from the loader of each process, and "
            "use_distributed_sampler=False: that is right where each goes through all rows. Where "
            "each has a part of them, the likelihood would count too little: state the whole "
            "number, PyroSVIModule(..., dataset_size=N)."
        )
