"""What a fitted module says of its posterior."""

from collections.abc import Mapping, Sequence
from typing import Any

from pyro_lightning.arguments import read_choice, read_count, read_flag
from pyro_lightning.arviz_apis import CONTAINERS, make_container
from pyro_lightning.guide_check import GuideCheck, check_guide
from pyro_lightning.inference_data import GROUPS, collect_groups, named_dims, read_groups
from pyro_lightning.prediction_hooks import Predictions
from pyro_lightning.prepared import local_sites


class AfterFit(Predictions):
    """Checks of the guide, and its draws for other programs."""

    def check_guide(
        self, data: Any, num_samples: int = 1000, *, max_rows: int | None = None
    ) -> GuideCheck:
        r"""Say whether the guide is to be trusted, by the importance weights of its draws.

        .. math:: w_s \propto p(\theta_s) \prod_{i=1}^{N} p(x_i \mid \theta_s) / q(\theta_s)

        Reads the data once, a batch at a time, and runs the model at S draws for each batch: S N/B
        runs, or fewer where one serves several draws, as of ``(x * w).sum(-1)`` in place of
        ``x @ w``. For models of global latents, and of discrete latents of rows that
        ``TraceEnum_ELBO`` sums out; parameters of the model are taken as they are.

        Args:
            data: The datamodule that the module was trained on, which is set up, or a loader of its
                N rows.
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

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> from pyro_lightning import ArrayDataModule, PyroSVIModule
            >>> def model(x):
            ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
            >>> svi = PyroSVIModule(model, dataset_size=100)
            >>> _ = svi.loss(torch.ones(100))
            >>> data = ArrayDataModule(torch.ones(100), batch_size=50)
            >>> svi.check_guide(data, 200).agrees  # it has not trained
            False

        Source: Yao et al. 2018, "Yes, but did it work?: Evaluating variational inference"; Vehtari
        et al. 2024, "Pareto smoothed importance sampling".
        """
        return check_guide(self, self._batches_of(data), num_samples, max_rows)

    def to_inference_data(
        self,
        data: Any,
        num_samples: int = 1000,
        *,
        groups: str | Sequence[str] = GROUPS,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
        local_latents: bool = False,
        container: str = "auto",
    ) -> Any:
        """Put draws and data into ArviZ's container, for its summaries, comparisons and plots.

        All of it is held in memory: S N numbers for each observed site in ``posterior_predictive``
        and ``log_likelihood`` each. For large N give a loader of some rows, or fewer draws.
        Draws of a guide are independent: they are one chain, whose ``r_hat`` says nothing, and
        :meth:`check_guide` says whether they are draws of the posterior.

        Args:
            data: A loader of rows, in whose order they stand; or a datamodule that is set up, for
                its training rows in the order of the data set.
            num_samples: S.
            groups: Which groups to make: ``posterior``, ``posterior_predictive`` and
                ``log_likelihood`` (pointwise, in nats, without N/B), which share S draws of the
                global latents; ``prior`` (global latents); ``observed_data``; and
                ``constant_data``, the other fields of batches that are dicts.
            dims: Names of the dimensions of a variable beside chain and draw, as
                ``{"w": ["feature"]}``. That of rows is named after the data plate by default.
            coords: Labels along a dimension, as ``{"feature": ["age", "income"]}``.
            local_latents: Whether the posterior holds latents of rows, ``(1, S, N, ...)``: those of
                ``posterior_predictive``. ``log_likelihood`` has draws of them of its own.
            container: ``"InferenceData"`` of ArviZ 0.x, ``"DataTree"`` of 1.x, or ``"auto"`` for
                that of the ArviZ that is installed.

        Returns:
            An ``arviz.InferenceData`` or ``xarray.DataTree``.

        Raises:
            ImportError: Where ArviZ is not installed: ``pip install "pyro-lightning[arviz]"``.
            RuntimeError: Before the first fit or loss.
            ValueError: For names, labels and groups that are not there, and for a group that
                cannot be made, as the likelihood of rows whose latents are summed out.

        Example:
            >>> import pyro, torch, pyro.distributions as dist
            >>> from pyro_lightning import ArrayDataModule, PyroSVIModule
            >>> def model(x):
            ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
            ...     with pyro.plate("data", len(x)):
            ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
            >>> svi = PyroSVIModule(model, dataset_size=10)
            >>> _ = svi.loss(torch.zeros(10))
            >>> data = ArrayDataModule(torch.zeros(10), batch_size=4)
            >>> found = svi.to_inference_data(data, 50, dims={"x": ["day"]})
            >>> dict(found["log_likelihood"]["x"].sizes)
            {'chain': 1, 'draw': 50, 'day': 10}

        Source: the schema of ArviZ's InferenceData.
        """
        num_samples = read_count(num_samples, "num_samples")
        wanted = read_groups(groups)
        read_choice(container, "container", CONTAINERS)
        read_flag(local_latents, "local_latents")
        found = collect_groups(
            self, self._batches_of(data), num_samples, wanted, local_latents=local_latents
        )
        plate = next(iter(self._row_plates()), "row")
        labels = {} if coords is None else coords
        local = local_sites(self) if local_latents else ()
        named = named_dims(found, plate, {} if dims is None else dims, labels, local)
        return make_container(found, dims=named, coords=labels, container=container)
