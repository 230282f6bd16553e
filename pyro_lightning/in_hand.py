"""The batch that is run, for errors to name it with its rows."""

from typing import Any

import torch

from pyro_lightning._lightning import loaders_of
from pyro_lightning.batches import named_tensors
from pyro_lightning.diagnosis import NonFiniteLoss
from pyro_lightning.layout import contents_of, differences, layout_of, trailing_shapes
from pyro_lightning.retold import is_foreign, retell
from pyro_lightning.row_numbers import numbers_of_rows
from pyro_lightning.rows import data_of, shown
from pyro_lightning.watched import FailedBatch, batch_name


class InHand:
    """The batch that is run, for errors to name it.

    Attributes:
        stage: What the Trainer does.
        batch: The batch of the loader.
        number: Which batch of the epoch it is.
        loader: Which of several loaders of an evaluation it is from.
        part: Which mini-batch of it is run, where there are several.
    """

    def __init__(self, module: Any, stage: str, batch: Any, number: int, loader: int) -> None:
        self._module = module
        self.stage, self.batch, self.number, self.loader = stage, batch, number, loader
        self.part: int | None = None

    def __enter__(self) -> None:
        self._module.__dict__["_in_hand"] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._module.__dict__["_in_hand"] = None
        if isinstance(error, Exception) and not isinstance(error, StopIteration):
            retell(error, *self.told(error))

    def told(self, error: Exception) -> tuple[str, str]:
        """Say which batch it is, and what may be wrong with it: before and after a message."""
        loaders = loaders_of(self._module.trainer, self.stage)
        several = self.stage != "training" and len(loaders) > 1
        where = batch_name(
            self._module.trainer, self.stage, self.number, self.loader if several else None
        )
        if isinstance(self.batch, FailedBatch):
            return self.batch.where, ""
        try:
            rows = self._module.num_rows(data_of(self.batch))
        except Exception:  # this may be the very error
            return where, self._unlike_first()
        alone = len(loaders) == 1 or several
        loader = loaders[self.loader] if alone and len(loaders) > self.loader else None
        numbers = numbers_of_rows(self.batch, loader, self.number)
        if numbers is not None and len(numbers) != rows:
            numbers = None
        of_data = "" if numbers is None else f", {shown(numbers)} of the data set"
        start = 0
        if self.part is not None:
            size = self._module._rows_per_step or rows
            start, last = self.part * size, min((self.part + 1) * size, rows) - 1
        more, at_fault = "", ""
        if is_foreign(error):
            more = f" The batch holds {contents_of(self.batch)}.{_not_finite(data_of(self.batch))}"
        elif isinstance(error, NonFiniteLoss) and error.rows:
            if numbers is None:
                more = " IndexedDataset gives rows their numbers, for this message too."
            else:
                found = [numbers[start + row] for row in error.rows]
                at_fault = f"; at fault: {shown(found)} of the data set"
        where += f" ({rows} rows{of_data}{at_fault})"
        if self.part is not None:
            where += f", mini-batch {self.part} of it (its rows {start} to {last})"
        return where, more + self._unlike_first()

    def _unlike_first(self) -> str:
        known = self._module._layouts.get((self.stage, self.loader))
        if known is None:
            return ""
        layout, shapes = known
        found = list(differences(layout_of(self.batch), layout))
        if not found:
            now = trailing_shapes(self.batch)
            found = [
                f"{path} has rows of shape {now[path]}, and had {shape}"
                for path, shape in shapes.items()
                if now.get(path, shape) != shape
            ]
        return f" Unlike the first batch: {'; '.join(found)}." if found else ""


def batches_of(trainer: Any, stage: str, loader: int) -> float:
    """Count the batches of a loader, by what the Trainer knows."""
    if stage == "training":
        return float(trainer.num_training_batches)
    counts = trainer.num_val_batches if stage == "validation" else trainer.num_test_batches
    return float(counts[loader])


def _not_finite(data: Any) -> str:
    found = [
        f"{path} in rows {shown(bad.flatten(1).any(1).nonzero().flatten().tolist())}"
        for path, tensor in named_tensors(data, "batch")
        if tensor.dim() and (bad := ~torch.isfinite(tensor.unsqueeze(-1))).any()
    ]
    return f" Not finite: {'; '.join(found)} of the batch." if found else ""
