"""Refusals of checkpoints of another fit: other data plates, other data, other steps."""

from collections.abc import Mapping
from typing import Any


def refuse_other_plates(module: Any, stored: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other data plates than a module has.

    Args:
        module: A ``PyroSVIModule``.
        stored: What the checkpoint holds of its own, in the format of this version.

    Raises:
        ValueError: Saying which plates the checkpoint has.
    """
    if stored["plates"] is None:
        return
    columns = {name: module._data_plates[name] for name in module._columns}
    plates = module._row_plates()
    if set(stored["plates"]) != set(plates) or stored["columns"] != columns:
        there = _data_plate(stored["plates"], stored["columns"])
        raise ValueError(
            f"the checkpoint is of data_plate={there}, and this module has "
            f"{_data_plate(plates, columns)}: give it data_plate={there}. Where the plate of "
            "the model itself has another name now, load the weights alone, by load_state_dict."
        )


def refuse_other_data(module: Any, stored: Mapping[str, Any]) -> None:
    """Refuse to go on with a fit on data of another size, or with other steps.

    Args:
        module: A ``PyroSVIModule`` that is set up for a fit.
        stored: As in :func:`refuse_other_plates`.

    Raises:
        ValueError: Saying what the checkpoint has, and the module.
    """
    size, rows = stored["dataset_size"], stored["identities"]
    anew = "To start a new fit from these weights, load_from_checkpoint and fit without ckpt_path"
    if size not in (None, module._dataset_size) and module._given_size is None:
        raise ValueError(
            f"the checkpoint is of a fit to N = {size} rows, and the training set has "
            f"{module._dataset_size}: the optimizer would go on where the loss is another. If "
            "the same fit is to go on with these data, state it: PyroSVIModule(..., "
            f"dataset_size={module._dataset_size}). {anew}."
        )
    if rows is not None and module._per_row() and rows != module._count_rows():
        raise ValueError(
            f"the checkpoint has parameters for {rows} rows, and {module._count_rows()} rows of "
            "the training set have a number: a guide with latents of each row serves one data "
            "set. Resume on that one, or make a new module."
        )
    steps = stored["steps_per_batch"]
    if steps not in (None, module.steps_per_batch):
        raise ValueError(
            f"the checkpoint is of steps_per_batch={steps}, and this module has "
            f"{module.steps_per_batch}: what is done would be counted wrongly. Resume with "
            f"{steps}. {anew}."
        )


def _data_plate(plates: list[str], columns: Mapping[str, int | None]) -> str:
    """Write what a user would hand over as ``data_plate``."""
    if columns:
        return repr({**dict.fromkeys(plates), **columns})
    return repr(plates if len(plates) > 1 else next(iter(plates), None))
