"""The callback that follows the posterior of global latents over a fit."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from pyro_lightning.arguments import read_count, read_fraction
from pyro_lightning.iterates import Trail
from pyro_lightning.noise import noise_from
from pyro_lightning.plates import read_names
from pyro_lightning.served import check_served
from pyro_lightning.trace_plot import interval_figure, need_matplotlib

_SEED = 0  # equal noise each time, so that what moves is the guide
_KEPT = 1000  # times that a figure shows at most
_STATISTICS = 4


class PosteriorMonitor(Callback):
    """Logs means, sds and intervals of global latents by the guide, as it trains.

    Loggers get ``posterior/w[0]_mean``, ``posterior/w[0]_sd`` and the ends of the interval,
    ``posterior/w[0]_q5`` and ``posterior/w[0]_q95`` where it holds 90%, under the number of the
    optimizer step; these are no metrics for other callbacks to watch. A figure of the intervals
    over steps goes to TensorBoard as ``posterior``, and for loggers that write to a folder, such as
    ``CSVLogger``, to ``posterior.png`` there. Rank 0 alone logs.

    Draws are made with the same noise each time, and the random numbers of the fit stay what they
    would be without this callback.

    Args:
        sites: Names of the latents; all global ones by default.
        every_n_epochs: After how many epochs.
        every_n_steps: After how many optimizer steps, in place of epochs; with ``steps_per_batch``
            after the batch of the loader in which these are taken.
        num_samples: Draws each time.
        interval: Probability of the interval, between its equal tails.
        max_entries: How many entries of a site are followed, its first ones.
        figure_every: After how many times the figure is drawn, beside the fit's end; 0 draws none.

    Raises:
        TypeError: For arguments of a wrong kind, or another module than a ``PyroSVIModule``.
        ValueError: For sites that are no global latents, or where there is none.
        ImportError: When figures are to be drawn without the extra ``plots``.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from pyro_lightning import ArrayDataModule, PosteriorMonitor, PyroSVIModule
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
        >>> folder = getfixture("tmp_path")
        >>> trainer = Trainer(accelerator="cpu", max_epochs=2, logger=CSVLogger(folder),
        ...     enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False, callbacks=[PosteriorMonitor(["mu"])])
        >>> trainer.fit(PyroSVIModule(model), datamodule=ArrayDataModule(torch.ones(9)))
        >>> (folder / "lightning_logs/version_0/posterior.png").exists()
        True
    """

    def __init__(
        self,
        sites: Sequence[str] | None = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        num_samples: int = 500,
        interval: float = 0.9,
        max_entries: int = 10,
        figure_every: int = 10,
    ) -> None:
        self.sites = None if sites is None else read_names(sites, "sites")
        self.every_n_epochs = read_count(every_n_epochs, "every_n_epochs")
        self.every_n_steps = every_n_steps
        if every_n_steps is not None:
            self.every_n_steps = read_count(every_n_steps, "every_n_steps")
        self.num_samples = read_count(num_samples, "num_samples", least=2)
        self.interval = read_fraction(interval, "interval")
        self.max_entries = read_count(max_entries, "max_entries")
        self.figure_every = read_count(figure_every, "figure_every", least=0)
        if self.figure_every:
            need_matplotlib()
        self._names: list[str] = []
        self._trail, self._times, self._before = Trail(_KEPT), 0, 0

    # -- hooks ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begin a fit."""
        if stage != "fit":
            return
        check_served(self, pl_module)
        self._names, self._trail, self._times = [], Trail(_KEPT), 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse sites that the guide does not draw."""
        self._before = trainer.global_step
        self._draw(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after steps."""
        before, self._before = self._before, trainer.global_step
        every = self.every_n_steps
        if every is not None and self._before // every > before // every:
            self._follow(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log after epochs."""
        done = trainer.current_epoch + 1
        if self.every_n_steps is None and done % self.every_n_epochs == 0:
            self._follow(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw the figure of the whole fit."""
        if self.figure_every and len(self._trail) and trainer.is_global_zero:
            self._show(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what the figure shows."""
        return {"trail": self._trail.state_dict(), "times": self._times}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the figure."""
        self._trail.load_state_dict(state_dict["trail"])
        self._times = state_dict["times"]

    # -- what is logged ------------------------------------------------------------------------

    def _draw(self, pl_module: Any) -> torch.Tensor:
        """Draw the latents; returns mean, sd and interval of each entry, ``(4, entries)``."""
        with noise_from(_SEED, pl_module.device, in_python=True):
            drawn = pl_module.posterior_samples(self.num_samples)
        if not drawn:
            raise ValueError("the model has no global latents, and PosteriorMonitor none to follow")
        unknown = [site for site in self.sites or () if site not in drawn]
        if unknown:
            raise ValueError(
                f"PosteriorMonitor is to follow '{unknown[0]}', which is no global latent of the "
                f"guide. There are {', '.join(map(repr, drawn))}."
            )
        chosen = {site: drawn[site] for site in self.sites or drawn}
        self._names = [
            f"{site}{place}"
            for site, draws in chosen.items()
            for place in _places(draws.shape[1:], self.max_entries)
        ]
        parts = [draws.reshape(len(draws), -1)[:, : self.max_entries] for draws in chosen.values()]
        entries = torch.cat([part.cpu().double() for part in parts], 1)
        tail = (1 - self.interval) / 2
        ends = entries.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), 0)
        return torch.stack([entries.mean(0), entries.std(0), *ends])

    def _follow(self, trainer: Trainer, pl_module: Any) -> None:
        # On all ranks: a layer of the guide may wait for the others.
        found = self._draw(pl_module)
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        tail = 50 * (1 - self.interval)
        kinds = ("mean", "sd", f"q{tail:.3g}", f"q{100 - tail:.3g}")
        metrics = {
            f"posterior/{name}_{kind}": value
            for kind, values in zip(kinds, found.tolist(), strict=True)
            for name, value in zip(self._names, values, strict=True)
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step - 1)  # as Lightning counts, from 0
        self._trail.add(torch.cat([torch.tensor([float(step)]), found.flatten()]))
        self._times += 1
        if self.figure_every and self._times % self.figure_every == 0:
            self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        kept = self._trail.values()
        means, _, lower, upper = kept[:, 1:].reshape(len(kept), _STATISTICS, -1).unbind(1)
        figure = None
        for logger in trainer.loggers:
            add = getattr(getattr(logger, "experiment", None), "add_figure", None)
            if add is None and logger.log_dir is None:
                continue
            if figure is None:
                figure = interval_figure(self._names, kept[:, 0], means, lower, upper)
            if add is not None:
                add("posterior", figure, global_step=trainer.global_step)
            else:
                folder = Path(str(logger.log_dir))
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / "posterior.png")


def _places(shape: Sequence[int], most: int) -> list[str]:
    """Name the first entries of an array: ``[0,1]``, or nothing of a scalar."""
    if not shape:
        return [""]
    count = min(most, math.prod(shape))
    indices = torch.unravel_index(torch.arange(count), tuple(shape))
    return [f"[{','.join(map(str, each))}]" for each in torch.stack(indices, 1).tolist()]
