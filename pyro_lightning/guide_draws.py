"""`posterior_samples`: draws of latents from the guide of a module."""

from contextlib import nullcontext
from typing import Any

import torch

from pyro_lightning.arguments import read_count
from pyro_lightning.bad_batches import BadBatches
from pyro_lightning.guides import refuse_point, refuse_unmade
from pyro_lightning.layout import telling_contents
from pyro_lightning.posterior import draws_at_once, sample_latents
from pyro_lightning.rows import data_of
from pyro_lightning.saved_sites import refuse_other_draws
from pyro_lightning.states import evaluating


class GuideDraws(BadBatches):
    """Draws latents from the guide."""

    @torch.no_grad()
    def posterior_samples(
        self, num_samples: int, rows: Any = None, *, batch: Any = None
    ) -> dict[str, torch.Tensor]:
        """Draw latents from the guide; needs no data but where the guide does.

        Args:
            num_samples: Number of draws.
            rows: Row numbers in the training set (or a slice, or a mask of all rows), whose local
                latents are drawn jointly with the globals; for guides with parameters of each row.
            batch: B rows, whose local latents are drawn jointly with the globals; for guides that
                compute them from the data of the batch.

        Returns:
            Draws by site, on the module's device, without gradient: global latents,
            ``(num_samples, *shape of the site)``; with ``rows`` or ``batch``, local latents as
            well, ``(num_samples, len(rows), *event)``. Of entries that a mask leaves out in every
            batch a guide has learned nothing, and its draws mean nothing.

        Raises:
            RuntimeError: Before the first fit or loss, when the guide has no parameters yet.
            ValueError: For rows that do not exist or never trained, or whose latents the guide
                computes from data that are not given.
        """
        refuse_unmade(self)
        num_samples = read_count(num_samples, "num_samples")
        refuse_point(self.guide)
        if rows is not None and batch is not None:
            raise ValueError("rows and batch are two ways to say which rows to draw: give one")
        if self._globals_of_data and batch is None:
            raise ValueError(
                f"the guide computes global latents ({', '.join(self._globals_of_data)}) from its "
                "batch, so that there is no posterior without data: each batch gives another. "
                "Give it: posterior_samples(num_samples, batch=batch); or give these latents "
                "parameters of their own."
            )
        given = batch is not None
        batch = batch if given else self._prototype
        with telling_contents(batch) if given else nullcontext():
            return self._draw(num_samples, rows, batch, given)

    def _draw(
        self, num_samples: int, rows: Any, batch: Any, given: bool
    ) -> dict[str, torch.Tensor]:
        local: dict[str, int] = {}
        batch = self.transfer_batch_to_device(batch, self.device, 0)
        count, places = self.num_rows(data_of(batch)), torch.empty(0)
        if given:
            self._refuse_untrained(batch)
        else:
            batch, local, places = self._batch_of_rows(batch, count, rows)
            count = len(batch.rows)
        args, kwargs = self.model_inputs(data_of(batch))
        plates, at_once = () if given else self._row_plates(), draws_at_once(self.guide)
        with (
            evaluating(self),
            self._isolated() as handled,
            self._rows_of(batch, count),
        ):
            guide = self._handler(count)()(handled(self.guide))
            draws = sample_latents(
                guide, args, kwargs, num_samples, plates=plates, local=local, at_once=at_once
            )
        if given:
            refuse_other_draws(draws, self._sites, count)
        for site, dim in local.items():
            # A row that is asked for twice has one latent, and so one draw of it.
            draws[site] = draws[site].index_select(dim + 1, places.to(draws[site].device))
        return draws
