"""`PredictionWriter`: predictions stored batch by batch, one store for each process."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from pyro_lightning.arguments import read_choice, read_flag, shortly
from pyro_lightning.rows import IndexedBatch
from pyro_lightning.stores import (
    NETCDF,
    ZARR,
    dataset_of,
    needed_for,
    open_stores,
    remove,
    stores_in,
    write,
)


class PredictionWriter(BasePredictionWriter):
    """Stores what ``trainer.predict`` finds of each batch as it comes, through xarray.

    Every process writes a store of its own, whose rows have the numbers that they have in the data
    set: those of an :class:`IndexedBatch`, or else those by which Lightning's loader asked for
    them. Rows of an iterable data set, which have none, are counted, rank by rank.
    :meth:`open` reads all of it as one data set. With
    ``trainer.predict(..., return_predictions=False)`` nothing is kept in memory.

    Args:
        folder: Where the stores are written.
        format: ``"zarr"``, one store a process to which batches are appended; or ``"netcdf"``, one
            file a batch.
        overwrite: Whether predictions that are in the folder are removed first.

    Raises:
        ImportError: When the extra ``predict`` is not installed.
        FileExistsError: When a prediction starts and the folder holds another.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from lightning.pytorch import Trainer
        >>> from pyro_lightning import Prediction, PyroSVIModule
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.), obs=x)
        >>> svi = PyroSVIModule(model, dataset_size=10, prediction=Prediction(num_samples=50))
        >>> _ = svi.loss(torch.zeros(10))
        >>> folder = getfixture("tmp_path")
        >>> trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
        ...     callbacks=[PredictionWriter(folder)])
        >>> loader = torch.utils.data.DataLoader(torch.zeros(10), batch_size=4)
        >>> trainer.predict(svi, loader, return_predictions=False)
        >>> dict(PredictionWriter.open(folder)["x"].sizes)
        {'draw': 50, 'row': 10}
    """

    def __init__(
        self, folder: str | os.PathLike[str], format: str = ZARR, overwrite: bool = False
    ) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)
        self.format = read_choice(format, "format", (ZARR, NETCDF))
        self.overwrite = read_flag(overwrite, "overwrite")
        needed_for(self.format)
        self._counted: dict[int, int] = {}

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the folder; refuse or remove the predictions that it holds."""
        self._counted = {}
        there = [str(path) for path in stores_in(self.folder)]
        # Rank 0 speaks for all, so that none waits for one that has failed.
        there = trainer.strategy.broadcast(there)
        if there and not self.overwrite:
            raise FileExistsError(
                f"'{self.folder}' holds predictions already ({Path(there[0]).name}): name another "
                "folder, or say PredictionWriter(..., overwrite=True) to have them removed"
            )
        # Processes may have disks of their own, on which each removes what it left.
        mine = stores_in(self.folder, rank=trainer.global_rank)
        remove(stores_in(self.folder) if trainer.is_global_zero else mine)
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier("PredictionWriter")

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Store the prediction of a batch.

        Raises:
            TypeError: For what is no dict of tensors by site.
        """
        tensors = isinstance(prediction, Mapping) and all(
            isinstance(each, torch.Tensor) and each.dim() > 1 for each in prediction.values()
        )
        if not tensors:
            raise TypeError(
                "PredictionWriter stores tensors of shape (num_samples, B, ...) by site, as "
                f"predict_step of PyroSVIModule returns them; got {shortly(prediction)}"
            )
        if not prediction:  # nothing but rows that a sampler repeats
            return
        count = next(iter(prediction.values())).shape[1]
        numbers = _numbers(batch_indices, batch, count)
        counted = self._counted.get(dataloader_idx, 0)
        self._counted[dataloader_idx] = counted + count
        rows = np.arange(counted, counted + count) if numbers is None else numbers
        labels = pl_module.prediction.labels
        dataset = dataset_of(prediction, rows, numbers is not None, labels)
        write(dataset, self.folder, self.format, dataloader_idx, trainer.global_rank, batch_idx)

    @staticmethod
    def open(folder: str | os.PathLike[str], dataloader_idx: int = 0, chunks: Any = None) -> Any:
        """Open what was stored as one ``xarray.Dataset``, its rows in the order of their numbers.

        A site has the dimensions ``("draw", "row", "<site>_dim_0", ...)``; of a summary the first
        is ``"statistic"``, with the names of what was kept. The store of one process is read as it
        is used; several stores, and NetCDF files, are read into memory unless there are
        ``chunks``.

        Args:
            folder: What the writer was given.
            dataloader_idx: Which of several loaders.
            chunks: As in ``xarray.open_dataset``: ``{}`` reads lazily where dask is installed.

        Raises:
            FileNotFoundError: When the folder holds no predictions.
        """
        return open_stores(Path(folder), dataloader_idx, chunks)


def _numbers(indices: Any, batch: Any, count: int) -> np.ndarray[Any, Any] | None:
    """Tell the numbers of the rows of a batch, of which repeats were cut off at the end."""
    known = batch.rows if isinstance(batch, IndexedBatch) else indices
    if known is None or len(known) < count:
        return None
    try:
        numbers = np.asarray(torch.as_tensor(known).cpu())
    except (TypeError, ValueError, RuntimeError):  # a sampler of a user's own kind of indices
        return None
    whole = numbers.ndim == 1 and numbers.dtype.kind in "iu"
    return numbers[:count] if whole else None
