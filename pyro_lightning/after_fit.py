"""What a fitted module says of its posterior."""

from typing import Any

from pyro_lightning.checkpoints import Checkpoints
from pyro_lightning.guide_check import GuideCheck, check_guide
from pyro_lightning.training_data import training_batches


class AfterFit(Checkpoints):
    """Checks of the guide, and its draws for other programs."""

    def check_guide(
        self, data: Any, num_samples: int = 1000, *, max_rows: int | None = None
    ) -> GuideCheck:
        r"""Say whether the guide is to be trusted, by the importance weights of its draws.

        .. math:: w_s \propto p(\theta_s) \prod_{i=1}^{N} p(x_i \mid \theta_s) / q(\theta_s)

        Reads the data once, a batch at a time, and runs the model at S draws for each batch: S N/B
        runs. For models of global latents; parameters of the model are taken as they are.

        Args:
            data: The datamodule that the module was trained on, or a loader of its N rows.
            num_samples: S, at least 100; from 2,200 on k-hat up to 0.7 will do.
            max_rows: For large N: each draw is evaluated at about as many rows, four batches at
                least, chosen at random, and all others at the mean of the draws alone. The
                standard error that this leaves is told, and is about D / sqrt(max_rows) nats for D
                latents; above 0.5 there is no verdict.

        Returns:
            Pareto k-hat and a table of sites. Print it for a verdict, or hand it to
            ``rich.print``.

        Raises:
            ImportError: Where ArviZ is not installed: ``pip install "pyro-lightning[arviz]"``.
            RuntimeError: Before the first fit or loss.
            ValueError: For latents in the data plate or that the guide does not draw, a guide
                without width, data of other than N rows, and weights that are NaN.

        Source: Yao et al. 2018, "Yes, but did it work?: Evaluating variational inference"; Vehtari
        et al. 2024, "Pareto smoothed importance sampling".
        """
        return check_guide(self, training_batches(data), num_samples, max_rows)
