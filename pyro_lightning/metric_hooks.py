"""`metrics=`: torchmetrics that are fed in validation and test, and logged under their own keys."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from pyro_lightning.arguments import read_choice
from pyro_lightning.batch_runs import HowToRun
from pyro_lightning.guide_draws import GuideDraws
from pyro_lightning.metric_feeding import Evaluated, SiteMetrics
from pyro_lightning.metric_inputs import FROM_DRAWS, OF_A_SITE, Given, read_metrics
from pyro_lightning.noise import derived_seed, drawn_seed, noise_from
from pyro_lightning.prediction import Prediction
from pyro_lightning.predictive import (
    draws_vectorise,
    global_draws,
    log_likelihood_of,
    predictive_draws,
)
from pyro_lightning.states import forked_noise
from pyro_lightning.targets import observed_targets

_OF_BATCHES = OF_A_SITE | {"log_likelihood"}


class EvaluationDraws(NamedTuple):
    """What the batches of one evaluation share.

    Attributes:
        seed: What all random numbers follow from.
        posterior: Draws of the global latents; None where each batch has its own.
        how: How draws are run.
    """

    seed: int
    posterior: Mapping[str, torch.Tensor] | None
    how: HowToRun


class MetricHooks(GuideDraws):
    """Feeds metrics from posterior predictive draws of the batches of validation and test."""

    prediction: Prediction
    _metric_draws: EvaluationDraws | None = None

    def _read_metrics(self, metrics: Given) -> None:
        collections = read_metrics(metrics)
        self._metrics = nn.ModuleDict()
        self._metric_draws = None
        for stage in ("val", "test"):
            if collections:
                self._metrics[stage] = nn.ModuleList([SiteMetrics(collections)])

    def metrics_of(self, stage: str, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the metrics of the last validation or test, with what they were fed, by name.

        They are there to be plotted: ``svi.metrics_of("val")["PITHistogram"].plot()``. Names of a
        site's metrics begin with the site. On several processes call ``compute`` and ``plot`` on
        all.

        Args:
            stage: ``"val"`` or ``"test"``.
            dataloader_idx: Which of several loaders.

        Raises:
            ValueError: For another stage or loader.
        """
        held = self._held(read_choice(stage, "stage", ("val", "test")))
        if not held:
            return {}
        if not 0 <= dataloader_idx < len(held):
            raise ValueError(f"there are metrics of {len(held)} loaders, not of {dataloader_idx}")
        return held[dataloader_idx].named()

    def _held(self, stage: str) -> Sequence[SiteMetrics]:
        """Return the metrics of each loader."""
        held: Any = self._metrics[stage] if stage in self._metrics else []
        return held  # type: ignore[no-any-return]

    def _begin_metrics(self, stage: str, loaders: int) -> None:
        held: Any = self._held(stage)
        self._metric_draws = None
        # States that can be fed after the evaluation, too.
        with torch.inference_mode(False):
            while held and len(held) < loaders:
                held.append(held[0].another().to(self.device))
            del held[loaders:]
            for each in held:
                each.reset()

    def _log_metrics(self, stage: str) -> None:
        self._metric_draws = None
        held = self._held(stage)
        for number, each in enumerate(held):
            fed = torch.tensor(float(each.batches), device=self.device)
            fed = self.trainer.strategy.reduce(fed, reduce_op="sum")
            suffix = f"/dataloader_idx_{number}" if len(held) > 1 else ""
            if not fed:  # on any rank
                continue
            # Equal on all ranks, as Lightning cannot know. Of several loaders it names those of a
            # step only.
            options: dict[str, Any] = {"sync_dist": True, "add_dataloader_idx": False}
            for name, value in each.numbers(f"{stage}_").items():
                self.log(f"{name}{suffix}", value, on_step=False, on_epoch=True, **options)

    # -- a batch ---------------------------------------------------------------------------------

    def _update_metrics(
        self, stage: str, batch: Any, rows: int, per_obs: torch.Tensor, *numbers: int
    ) -> None:
        """Feed the metrics a batch without repeated rows, of this number and of this loader."""
        held = self._held(stage)
        if not held or not rows:
            return
        metrics, evaluated = held[numbers[1]], Evaluated(per_obs, rows)
        if metrics.needs & _OF_BATCHES:
            if self._metric_draws is None:
                self._metric_draws = self._draws_of_evaluation(batch)
            seed = derived_seed(self._metric_draws.seed, self.trainer.global_rank, *numbers)
            with noise_from(seed, self.device, self._draws_in_python), torch.no_grad():
                self._predict(metrics, batch, evaluated, self._metric_draws)
        metrics.update(evaluated)

    def _draws_of_evaluation(self, batch: Any) -> EvaluationDraws:
        """Draw the global latents, once for all batches and ranks.

        The generators stay as they are: no figure is another for the draws of metrics.
        """
        settings, posterior = self.prediction, None
        with forked_noise():
            seed = drawn_seed() if settings.seed is None else settings.seed
        with noise_from(derived_seed(seed), self.device, self._draws_in_python):
            if not self._globals_of_data:
                posterior = global_draws(self, settings.num_samples)
            how = HowToRun(settings.chunk_size, settings.parallel)

            def vectorise() -> bool:
                shared = self._posterior(posterior, batch), settings.num_samples
                return draws_vectorise(self, batch, *shared, local=settings.local)

            how.find_out(vectorise)
        return EvaluationDraws(seed, posterior, how)

    def _posterior(
        self, posterior: Mapping[str, torch.Tensor] | None, batch: Any
    ) -> Mapping[str, torch.Tensor]:
        if posterior is not None:
            return posterior
        return self.posterior_samples(self.prediction.num_samples, batch=batch)

    def _predict(
        self, metrics: SiteMetrics, batch: Any, evaluated: Evaluated, shared: EvaluationDraws
    ) -> None:
        settings = self.prediction
        given = self, batch, self._posterior(shared.posterior, batch), settings.num_samples
        evaluated.target = target = observed_targets(*given, settings.local)
        options: dict[str, Any] = {"how": shared.how, "local": settings.local}
        if sites := metrics.sites_for(FROM_DRAWS, target):
            evaluated.draws = predictive_draws(*given, sites=sorted(sites), **options)
        if metrics.sites_for({"log_likelihood"}, target):
            each = log_likelihood_of(*given, **options)
            # Other plates are of entries of a row.
            evaluated.log_likelihood = {
                name: terms.reshape(*terms.shape[:2], -1).sum(-1) for name, terms in each.items()
            }
