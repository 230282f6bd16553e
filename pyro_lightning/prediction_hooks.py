"""Lightning's side of prediction: one set of global draws for all batches and processes."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from pyro_lightning._lightning import stage_loader, stage_of
from pyro_lightning.arguments import read_count, shortly
from pyro_lightning.batch_runs import HowToRun
from pyro_lightning.draws import read_draws
from pyro_lightning.in_hand import InHand
from pyro_lightning.layout import layout_of
from pyro_lightning.loader_lists import each_loader
from pyro_lightning.noise import derived_seed, drawn_seed, noise_from
from pyro_lightning.prediction import Prediction, PredictionFields, read_prediction
from pyro_lightning.predictive import (
    draws_vectorise,
    global_draws,
    log_likelihood_of,
    predictive_draws,
)
from pyro_lightning.prepared import rows_from_prior
from pyro_lightning.rank_zero import warn
from pyro_lightning.row_order import number_rows_, numbering, rows_in_order
from pyro_lightning.spawned import Spawned


class PredictionRun:
    """What all batches of one prediction share.

    Attributes:
        settings: What is drawn.
        seed: What all its random numbers follow from.
        posterior: Draws of the global latents.
        how: How draws are run, which the first batch tells.
        warned: Whether it was said that latents come from the prior.
    """

    def __init__(self, module: Any, settings: Prediction, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self.how = HowToRun(settings.chunk_size, settings.parallel)
        self.warned = settings.local == "prior"
        with noise_from(seed, module.device, module._draws_in_python):
            self.posterior = global_draws(module, settings.num_samples)

    def of_batch(self, module: Any, batch: Any, *numbers: int) -> dict[str, torch.Tensor]:
        """Draw sites of a batch; ``numbers`` tell it from others."""
        settings, shared = self.settings, (self.posterior, self.settings.num_samples)
        self._tell_of_prior(module, batch)
        seed = derived_seed(self.seed, *numbers)
        with noise_from(seed, module.device, module._draws_in_python):
            given = module, batch, *shared
            self.how.find_out(partial(draws_vectorise, *given, local=settings.local))
            draws = predictive_draws(
                *given, sites=settings.sites, how=self.how, local=settings.local
            )
        return {name: settings.kept(each) for name, each in draws.items()}

    def _tell_of_prior(self, module: Any, batch: Any) -> None:
        if self.warned:
            return
        sites, rows = rows_from_prior(module, batch)
        if rows:
            self.warned = True
            warn(
                f"{', '.join(map(repr, sites))} of {rows} rows of the first such batch, of which "
                "the guide knows nothing since they did not train or have no number, are drawn "
                "from the prior given the globals. To predict rows of the fit, hand over the "
                "IndexedDataset or the datamodule of the fit; "
                "Prediction(local='prior') says that new rows are meant.",
                stacklevel=4,
            )


class Predictions(Spawned):
    """Predicts batches, and tells how likely what was observed in them is."""

    _prediction: Prediction
    _prediction_run: PredictionRun | None = None

    @property
    def prediction(self) -> Prediction:
        """What ``trainer.predict`` draws: a :class:`Prediction`, or a dict of its fields."""
        return self._prediction

    @prediction.setter
    def prediction(self, value: Prediction | PredictionFields | None) -> None:
        self._prediction = read_prediction(value)

    # -- trainer.predict -----------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Set up; have the data set of the fit number its rows for a guide that needs it."""
        super().setup(stage)
        if stage == "predict":
            self._number_predicted_rows()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read a checkpoint, which Lightning does after set-up where it is given ``ckpt_path``."""
        super().on_load_checkpoint(checkpoint)
        if stage_of(self) == "predict":
            self._number_predicted_rows()

    def _number_predicted_rows(self) -> None:
        """Number predicted rows that are those of the fit, or of the datamodule's training set.

        The latter stands for the former in a module from a checkpoint, which does not tell the data
        of the fit from others.
        """
        source = self._source
        if source is None and self._trained is not None:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if getattr(data, "identities", None) == self._identities:
                source = getattr(data, "source", None)
        if source is not None and self._per_row():
            loaders = each_loader(stage_loader(self.trainer, "predict"))
            self._numbered += tuple(number_rows_(loaders, source))

    def teardown(self, stage: str) -> None:
        """Give up the draws of a prediction."""
        self._prediction_run = None
        super().teardown(stage)

    def on_predict_start(self) -> None:
        """Draw the global latents, once for all batches and the same on all processes."""
        settings = self.prediction
        seed = drawn_seed() if settings.seed is None else settings.seed
        seed = self.trainer.strategy.broadcast(seed)
        # In the precision of the steps, which Lightning's hooks do not run in.
        with self.trainer.precision_plugin.predict_step_context(), torch.no_grad():
            self._prediction_run = PredictionRun(self, settings, seed)

    def predict_step(
        self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0
    ) -> dict[str, torch.Tensor]:
        """Draw sites of a batch from the posterior predictive, as :attr:`prediction` says.

        Draw s of all batches has the same global latents, so that a sum over rows of the data set,
        draw by draw, is a draw of that sum. Rows that a ``DistributedSampler`` repeats are left
        out.

        Returns:
            ``(num_samples, B, *other plates, *event)`` by site, or
            ``(len(summary), B, *other plates, *event)``; nothing for a batch of repeats alone.
        """
        trainer, run = self._trainer, self._prediction_run
        if trainer is None or not trainer.predicting:
            settings = self.prediction
            seed = drawn_seed() if settings.seed is None else settings.seed
            return PredictionRun(self, settings, seed).of_batch(self, batch, 0, 0, batch_idx)
        if run is None:
            raise RuntimeError(
                "on_predict_start of this subclass leaves out what prediction needs: let it call "
                "super().on_predict_start()"
            )
        with InHand(self, "prediction", batch, batch_idx, dataloader_idx):
            batch, rows = self._without_repeats(batch, batch_idx, dataloader_idx)
            if not rows:
                return {}
            return run.of_batch(self, batch, trainer.global_rank, dataloader_idx, batch_idx)

    # -- log-likelihood ------------------------------------------------------------------------

    def log_likelihood(
        self,
        data: Any,
        num_samples: int = 1000,
        *,
        posterior: Mapping[str, torch.Tensor] | None = None,
        chunk_size: int | None = None,
        parallel: bool | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""Compute the log-likelihood of each row, for draws from the guide.

        .. math:: \log p(y_i \mid \theta^{(s)}, z_i^{(s)})

        in nats, without N/B: a row counts once. Latents of rows are drawn from the guide, or from
        the prior given the globals for rows that never trained. All of it is held in memory;
        :meth:`iter_log_likelihood` goes through it batch by batch.

        Args:
            data: A loader or other iterable of batches, whose order is kept; or a datamodule that
                is set up, for its training rows in the order of the data set.
            num_samples: S, how many draws.
            posterior: Draws of the global latents, as from :meth:`posterior_samples`, in place of
                new ones.
            chunk_size: How many draws are run together; by default 2^18 / B.
            parallel: Whether these are one run of model and guide; by default where it is the same.

        Returns:
            ``(num_samples, rows, *other plates)`` by observed site, on the CPU.

        Raises:
            RuntimeError: Before the first fit or loss.
            TypeError: For a batch in the place of several.
            ValueError: When nothing is observed, or for a datamodule of several training loaders.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_lightning import ArrayDataModule, PyroSVIModule
            >>> def model(x):
            ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
            >>> svi = PyroSVIModule(model, dataset_size=10)
            >>> _ = svi.loss(torch.zeros(10))
            >>> data = ArrayDataModule(torch.zeros(10), batch_size=4)
            >>> svi.log_likelihood(data, 50)["x"].shape
            torch.Size([50, 10])
        """
        parts: dict[str, list[torch.Tensor]] = {}
        batches = self.iter_log_likelihood(
            data, num_samples, posterior=posterior, chunk_size=chunk_size, parallel=parallel
        )
        for found in batches:
            for name, each in found.items():
                parts.setdefault(name, []).append(each.cpu())
        if not parts:
            raise ValueError("data has no batch: expected at least one, with observed rows")
        return {name: torch.cat(each, 1) for name, each in parts.items()}

    def iter_log_likelihood(
        self,
        data: Any,
        num_samples: int = 1000,
        *,
        posterior: Mapping[str, torch.Tensor] | None = None,
        chunk_size: int | None = None,
        parallel: bool | None = None,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield :meth:`log_likelihood` batch by batch, in the memory of one, on the device.

        Args:
            data: As in :meth:`log_likelihood`.
            num_samples: As in :meth:`log_likelihood`.
            posterior: As in :meth:`log_likelihood`.
            chunk_size: As in :meth:`log_likelihood`.
            parallel: As in :meth:`log_likelihood`.
        """
        num_samples = read_count(num_samples, "num_samples")
        if posterior is None:
            shared = global_draws(self, num_samples)
        else:
            shared = read_draws(posterior, "posterior")
        if shared:
            num_samples = len(next(iter(shared.values())))
        how = HowToRun(chunk_size, parallel)
        for batch in self._batches_of(data):
            given = self, batch, shared, num_samples
            how.find_out(partial(draws_vectorise, *given))
            yield log_likelihood_of(*given, how=how)

    def _batches_of(self, data: Any) -> Iterator[Any]:
        """Go through batches on the device; of a datamodule through its training rows, in order."""
        loader: Iterable[Any] = data
        if isinstance(data, LightningDataModule):
            loaders = list(each_loader(data.train_dataloader()))
            if len(loaders) != 1:
                raise ValueError(
                    f"the datamodule has {len(loaders)} training loaders: hand over the one of "
                    "whose batches the log-likelihood is asked for"
                )
            loader = rows_in_order(loaders[0])
        elif (
            isinstance(data, torch.Tensor | str | Mapping)
            or not hasattr(data, "__iter__")
            # Its columns would be taken for batches.
            or (isinstance(data, tuple | list) and len(data) > 1)
            and layout_of(data) == layout_of(self._prototype)
        ):
            raise TypeError(
                "expected a loader or other iterable of batches, or a datamodule, got "
                f"{shortly(data)}: of one batch make [batch]"
            )
        number = isinstance(data, LightningDataModule) and bool(self._per_row())
        with numbering([loader] if number else []):
            for batch in loader:
                yield self.transfer_batch_to_device(batch, self.device, 0)
