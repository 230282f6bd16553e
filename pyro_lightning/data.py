"""A datamodule over arrays, cutting each batch with one index operation an array."""

import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, SequentialSampler

from pyro_lightning._lightning import shares_of_rows
from pyro_lightning.arguments import (
    read_choice,
    read_count,
    read_device,
    read_flag,
    read_fraction,
)
from pyro_lightning.arrays import ArrayDataset, Arrays, Columns
from pyro_lightning.loader import RowLoader
from pyro_lightning.orders import InBlocks, in_order, shuffled
from pyro_lightning.retold import telling
from pyro_lightning.samplers import DistributedRows, Order, RowBatches, ShuffledRows
from pyro_lightning.splits import split_rows

_OPTIONAL = {
    "val_dataloader": "_val",
    "test_dataloader": "_test",
    "predict_dataloader": "_predict",
}

BLOCK_BYTES = 2**22  # of a block of rows: what a disk reads at its full speed
BLOCKS_TOGETHER = 64
SHARE_OF_DEVICE = 0.25  # of free memory: the rest is for model, optimizer and batches


class ArrayDataModule(LightningDataModule):
    """Feeds arrays in mini-batches: every row trains unless told otherwise.

    Args:
        arrays: A tensor, NumPy array or ``numpy.memmap``, or a tuple or dict of them, with the
            same number of rows. A memmap is never loaded whole. A path of a ``.npy`` file stands
            for its memmap, one of a ``.npz`` file for the dict of its arrays.
        batch_size: B, rows in a batch.
        val_split: Fraction of the rows, in [0, 1), held out for validation.
        test_split: Fraction of the rows, in [0, 1), held out for the test.
        val: Arrays for validation, instead of a fraction.
        test: Arrays for the test, instead of a fraction.
        predict: Arrays for prediction.
        shuffle: True for training rows in a new random order each epoch. ``"blocks"`` for files
            that do not fit in memory: blocks of neighbouring rows, 4 MiB each, come in random
            order, and the rows of 64 blocks are shuffled, so that the file is read in stretches
            and once an epoch. A batch of 100 rows then mixes 51 blocks, one of 256 rows 63. Rows
            that are in no order are as well mixed as by True; a file that is sorted by what the
            model explains needs True. False for rows in order.
        seed: Seed of the split.
        num_workers: Loader processes; none where the arrays are on a device.
        pin_memory: Whether batches are pinned; by default when a CUDA device is there. A training
            on it then copies each batch while the one before is used.
        device: Where the arrays are kept while they are used: None for where they are; a device;
            ``"auto"`` for the Trainer's CUDA device if they take at most a quarter of its free
            memory. Batches are then cut there: the same rows in the same order. A memmap is
            copied to a device in parts.
        drop_last: Whether a smaller last batch is left out of training.

    Attributes:
        dataset_size: N, the number of training rows.

    Raises:
        ValueError: For wrong lengths, a fraction out of range, splits that leave nothing, or
            another ``shuffle`` than these.
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
        shuffle: bool | str = True,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        device: str | torch.device | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = read_count(batch_size, "batch_size")
        self.device = read_device(device)
        self.shuffle = read_choice(shuffle, "shuffle", (True, False, "blocks"))
        self.drop_last = read_flag(drop_last, "drop_last")
        self.num_workers = read_count(num_workers, "num_workers", 0)
        self.pin_memory = None if pin_memory is None else read_flag(pin_memory, "pin_memory")
        seed = read_count(seed, "seed", 0)
        columns = Columns(arrays)
        whole = ArrayDataset(columns)
        sizes = {}
        for name, fraction, given in (("val", val_split, val), ("test", test_split, test)):
            fraction = read_fraction(fraction, f"{name}_split")
            if fraction and given is not None:
                raise ValueError(f"give {name} or {name}_split, not both")
            sizes[name] = round(fraction * len(whole))
            if fraction and not sizes[name]:
                raise ValueError(f"{name}_split={fraction} of {len(whole)} rows leaves nothing")
        held_out = sum(sizes.values())
        if held_out >= len(whole):
            raise ValueError(f"the splits leave none of {len(whole)} rows to train on")
        self._train = whole
        self._val, self._test = self._given(val, "val"), self._given(test, "test")
        self._predict = self._given(predict, "predict")
        if held_out:
            left, *parts = split_rows(len(whole), list(sizes.values()), seed)
            self._train = ArrayDataset(columns, left)
            if sizes["val"]:
                self._val = ArrayDataset(columns, parts[0])
            if sizes["test"]:
                self._test = ArrayDataset(columns, parts[1])
        self._leave_out_stages()

    def _leave_out_stages(self) -> None:
        # Lightning leaves out a stage whose hook is its own; an empty list it warns about.
        for hook, stage in _OPTIONAL.items():
            own = getattr(type(self), hook) is not getattr(ArrayDataModule, hook)  # of a subclass
            if getattr(self, stage) is None and not own:
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

    @property
    def source(self) -> int:
        """What tells the arrays from others: a number of what they hold."""
        return self._train.source

    def _datasets(self) -> list[ArrayDataset]:
        datasets = self._train, self._val, self._test, self._predict
        return [dataset for dataset in datasets if dataset is not None]

    @staticmethod
    def _given(arrays: Arrays | None, name: str) -> ArrayDataset | None:
        with telling(name):
            return None if arrays is None else ArrayDataset(arrays)

    def rows_per_batch(self, train: bool = True) -> int:
        """Rows that a loader hands on at once: B, times the steps that a training step takes."""
        module = self.trainer.lightning_module if train and self.trainer is not None else None
        return self.batch_size * int(getattr(module, "steps_per_batch", 1))

    def _order(self, dataset: ArrayDataset) -> Order:
        if self.shuffle == "blocks":
            row_bytes = max(1, dataset.columns.nbytes // dataset.identities)
            return InBlocks(max(1, BLOCK_BYTES // row_bytes), BLOCKS_TOGETHER)
        return shuffled if self.shuffle else in_order

    def _sampler(self, dataset: ArrayDataset) -> Any:
        """Choose what orders training rows; in several processes each has its share."""
        order = self._order(dataset)
        shares = None if self.trainer is None else shares_of_rows(self.trainer)
        if shares is not None and shares["num_replicas"] > 1 and not self.trainer.overfit_batches:  # type: ignore[union-attr]
            # The seed of Lightning's own distributed samplers. Theirs list all N rows.
            seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
            return DistributedRows(dataset, order, seed=seed, **shares)
        return ShuffledRows(dataset, order) if self.shuffle else SequentialSampler(dataset)

    def _home(self, columns: Columns) -> torch.device | None:
        """Where the arrays are to be kept; None for where they are."""
        if self.device is None:
            return None
        root = None if self.trainer is None else self.trainer.strategy.root_device
        if self.device == "auto":
            if root is None or root.type != "cuda" or columns.device == root:
                return columns.device
            free = torch.cuda.mem_get_info(root)[0]
            fits = columns.nbytes <= SHARE_OF_DEVICE * free and not columns.unindexed
            return root if fits else None
        wanted = torch.device(self.device)
        if root is not None and root.type == wanted.type:
            wanted = root  # each process of several has its own
        return None if wanted.type == "cpu" else wanted

    def _loader(self, dataset: ArrayDataset | None, train: bool = False) -> DataLoader[Any]:
        if dataset is None:  # asked for by a hook of a subclass
            raise ValueError(
                "this ArrayDataModule has no rows for that stage: give it arrays or a share of "
                "them, as in val=(x, y) or val_split=0.1, or make a loader without super()"
            )
        home = self._home(dataset.columns)
        if home is not None:
            dataset.columns.keep_on(home)
        pin = torch.cuda.is_available() if self.pin_memory is None else self.pin_memory
        batches = RowBatches(
            self._sampler(dataset) if train else SequentialSampler(dataset),
            self.rows_per_batch(train),
            train and self.drop_last,
            rows_per_step=self.batch_size,
            device=home,
        )
        workers = self.num_workers if home is None else 0
        return RowLoader(
            dataset,
            batch_sampler=batches,
            copy_to=self._copies_ahead_to() if home is None and pin else None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin and home is None,
        )

    def _copies_ahead_to(self) -> torch.device | None:
        """The Trainer's CUDA device, unless somebody looks at batches before they are there."""
        if self.trainer is None or self.trainer.strategy.root_device.type != "cuda":
            return None
        hooks = "on_before_batch_transfer", "transfer_batch_to_device"
        users = self, self.trainer.lightning_module
        if any(is_overridden(hook, user) for hook in hooks for user in users):
            return None
        return self.trainer.strategy.root_device

    def teardown(self, stage: str) -> None:
        """Give up what was copied to a device."""
        for dataset in self._datasets():
            dataset.columns.release()

    def on_exception(self, exception: BaseException) -> None:
        """Number rows no longer: Lightning does not tear down a module whose run failed."""
        for dataset in self._datasets():
            dataset.row_numbers = False
        self.teardown("fit")

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
        # Batches of lists: Lightning hands the numbers of predicted rows to callbacks as they are.
        loader = self._loader(self._predict)
        return DataLoader(
            loader.dataset,
            batch_size=self.batch_size,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            persistent_workers=loader.persistent_workers,
            pin_memory=loader.pin_memory,
        )
