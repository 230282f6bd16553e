"""A datamodule over arrays, cutting each batch with one index operation."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from pyro_lightning.arrays import ArrayDataset, Arrays, ShuffledRows

_OPTIONAL = {
    "val_dataloader": "_val",
    "test_dataloader": "_test",
    "predict_dataloader": "_predict",
}


def _as_is(batch: Any) -> Any:
    return batch


class ArrayDataModule(LightningDataModule):
    """Feeds arrays in mini-batches: every row trains unless told otherwise.

    Args:
        arrays: A tensor, NumPy array or ``numpy.memmap``, or a tuple or dict of them, with the
            same number of rows. A memmap is never loaded whole.
        batch_size: B, rows in a batch.
        val_split: Fraction of the rows, in [0, 1), held out for validation.
        test_split: Fraction of the rows, in [0, 1), held out for the test.
        val: Arrays for validation, instead of a fraction.
        test: Arrays for the test, instead of a fraction.
        predict: Arrays for prediction.
        shuffle: Whether training rows come in a new order each epoch.
        seed: Seed of the split.
        num_workers: Loader processes.
        pin_memory: Whether batches are pinned; by default when a CUDA device is there.
        drop_last: Whether a smaller last batch is left out of training.

    Attributes:
        dataset_size: N, the number of training rows.

    Raises:
        ValueError: For wrong lengths, a fraction out of range, or splits that leave nothing.
        TypeError: For something that is not an array of numbers.

    Example:
        >>> dm = ArrayDataModule((torch.zeros(10, 2), torch.zeros(10)), batch_size=4)
        >>> [len(y) for x, y in dm.train_dataloader()], dm.dataset_size
        ([4, 4, 2], 10)
    """

    def __init__(
        self,
        arrays: Arrays,
        batch_size: int = 256,
        *,
        val_split: float = 0.0,
        test_split: float = 0.0,
        val: Arrays | None = None,
        test: Arrays | None = None,
        predict: Arrays | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.num_workers, self.pin_memory = num_workers, pin_memory
        whole = ArrayDataset(arrays)
        sizes = {}
        for name, fraction, given in (("val", val_split, val), ("test", test_split, test)):
            if not 0 <= fraction < 1:
                raise ValueError(f"{name}_split must lie in [0, 1), got {fraction}")
            if fraction and given is not None:
                raise ValueError(f"give {name} or {name}_split, not both")
            sizes[name] = round(fraction * len(whole))
            if fraction and not sizes[name]:
                raise ValueError(f"{name}_split={fraction} of {len(whole)} rows leaves nothing")
        held_out = sum(sizes.values())
        if held_out >= len(whole):
            raise ValueError(f"the splits leave none of {len(whole)} rows to train on")
        self._train, self._val, self._test = whole, self._given(val), self._given(test)
        self._predict = self._given(predict)
        if held_out:
            order = np.random.default_rng(seed).permutation(len(whole))
            self._train = ArrayDataset(arrays, np.sort(order[held_out:]))
            if sizes["val"]:
                self._val = ArrayDataset(arrays, np.sort(order[: sizes["val"]]))
            if sizes["test"]:
                self._test = ArrayDataset(arrays, np.sort(order[sizes["val"] : held_out]))

        self._leave_out_stages()

    def _leave_out_stages(self) -> None:
        # Lightning leaves out a stage whose hook is its own; an empty list it warns about.
        for hook, stage in _OPTIONAL.items():
            if getattr(self, stage) is None:
                setattr(self, hook, getattr(super(), hook))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _OPTIONAL}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._leave_out_stages()

    @property
    def dataset_size(self) -> int:
        """N, the number of training rows."""
        return len(self._train)

    @property
    def identities(self) -> int:
        """How many rows the arrays have, those that are held out among them."""
        return self._train.identities

    @staticmethod
    def _given(arrays: Arrays | None) -> ArrayDataset | None:
        return None if arrays is None else ArrayDataset(arrays)

    def _loader(self, dataset: ArrayDataset | None, train: bool = False) -> DataLoader[Any]:
        assert dataset is not None  # a stage without rows has no loader of ours
        pin = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=ShuffledRows(dataset) if train and self.shuffle else None,
            drop_last=train and self.drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=pin,
            collate_fn=_as_is,
        )

    def on_exception(self, exception: BaseException) -> None:
        """Number rows no longer: Lightning does not tear down a module whose fit failed."""
        self._train.row_numbers = False

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of training rows."""
        return self._loader(self._train, train=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of validation rows, in order."""
        return self._loader(self._val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of test rows, in order."""
        return self._loader(self._test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of rows to predict, in order."""
        return self._loader(self._predict)
