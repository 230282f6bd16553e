"""Which of Lightning's strategies a module can train under."""

from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

_SHARDED = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def refuse_sharded(strategy: Any) -> None:
    """Refuse a strategy that spreads parameters over processes.

    Raises:
        TypeError: Saying what to use.

    Example:
        >>> refuse_sharded(FSDPStrategy())
        Traceback (most recent call last):
        ...
        TypeError: FSDPStrategy spreads each parameter over the processes ...
    """
    if isinstance(strategy, _SHARDED):
        raise TypeError(
            f"{type(strategy).__name__} spreads each parameter over the processes and puts it "
            "together for the forward of the module that holds it. Pyro's guides and pyro.param "
            "statements read their parameters without such a forward, and would find a part of "
            "each. Use strategy='ddp', or one device: the memory of a batch is that of B rows, and "
            "parameters of each of N rows are stepped and sent B at a time."
        )
