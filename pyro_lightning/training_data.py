"""The batches of a training set, outside a Trainer."""

from collections.abc import Iterable, Mapping
from typing import Any

from pyro_lightning.arguments import shortly


def training_batches(data: Any) -> Iterable[Any]:
    """Return the training loader of a datamodule, or the loader itself.

    A datamodule that no Trainer has prepared is prepared and set up.

    Raises:
        TypeError: For what is neither a datamodule nor one loader.
    """
    if hasattr(data, "train_dataloader"):
        if data.trainer is None:
            data.prepare_data()
            data.setup("fit")
        data = data.train_dataloader()
    # A tensor or tuple would be taken for a loader of rows.
    if isinstance(data, Mapping | tuple | list) or not hasattr(data, "__iter__"):
        raise TypeError(
            f"data must be a datamodule, or a loader of the training set, got {shortly(data)}"
        )
    if hasattr(data, "dim"):
        raise TypeError(
            "data must be a datamodule, or a loader of the training set, got a tensor: wrap it, "
            "ArrayDataModule(arrays)"
        )
    return data  # type: ignore[no-any-return]
