"""Intervals of latents over the steps of a fit, drawn."""

from collections.abc import Sequence
from typing import Any

import torch

_COLUMNS = 3


def need_matplotlib() -> None:
    """Import Matplotlib.

    Raises:
        ImportError: Naming the extra that installs it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need Matplotlib: pip install 'pyro-lightning[plots]'") from error


def interval_figure(
    names: Sequence[str],
    steps: torch.Tensor,
    means: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
) -> Any:
    """Draw a panel for each latent: its mean as a line, its interval as a band, over steps.

    Args:
        names: Of the latents.
        steps: ``(times,)``.
        means: ``(times, latents)``.
        lower: The interval's lower end, ``(times, latents)``.
        upper: Its upper end.

    Returns:
        A Matplotlib ``Figure`` that belongs to no window.

    Raises:
        ImportError: Without the extra ``plots``.

    Example:
        >>> zeros = torch.zeros(3, 2)
        >>> figure = interval_figure(["a", "b"], torch.arange(3), zeros, zeros - 1, zeros + 1)
        >>> [axes.get_title() for axes in figure.axes]
        ['a', 'b']
    """
    need_matplotlib()
    # Not pyplot, which keeps figures and chooses a backend for the whole process.
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout="constrained")
    times = steps.tolist()
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        band = lower[:, number].tolist(), upper[:, number].tolist()
        axes.fill_between(times, *band, alpha=0.3, linewidth=0)
        axes.plot(times, means[:, number].tolist())
        axes.set_title(name, fontsize="small")
        if number + columns >= len(names):
            axes.set_xlabel("step")
    return figure
