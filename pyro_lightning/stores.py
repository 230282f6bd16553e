"""Predictions of batches as xarray data sets, in Zarr stores or NetCDF files."""

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch

from pyro_lightning.arrays import as_numpy

ZARR, NETCDF = "zarr", "netcdf"
ROW, DRAW, STATISTIC = "row", "draw", "statistic"
_NEEDED = {ZARR: ("xarray", "zarr"), NETCDF: ("xarray", "h5netcdf")}
# All but the slash, as of poutine.scope, which is a folder to both formats; and the percent sign.
_SAFE = "".join(chr(code) for code in range(32, 127) if chr(code) not in "/%")
_ENDING = {ZARR: ".zarr", NETCDF: ".nc"}


def needed_for(kind: str) -> Any:
    """Import what a kind of store needs; returns xarray.

    Raises:
        ImportError: Naming the extra that installs it.
    """
    try:
        return [importlib.import_module(name) for name in _NEEDED[kind]][0]
    except ImportError as error:
        raise ImportError(
            f"predictions in {kind} need {' and '.join(_NEEDED[kind])}: "
            "pip install 'pyro-lightning[predict]'"
        ) from error


def dataset_of(
    prediction: Mapping[str, torch.Tensor], rows: np.ndarray[Any, Any], numbered: bool, labels: Any
) -> Any:
    """Make an xarray data set of what was predicted of a batch.

    Args:
        prediction: ``(S, B, *event)`` by site.
        rows: Number of each row, ``(B,)``.
        numbered: Whether these are numbers in the data set; else they are counted.
        labels: What the first dimension holds, where it is a summary.

    Raises:
        ValueError: For a site of the name of a dimension.
    """
    xarray = needed_for(ZARR)
    first = DRAW if labels is None else STATISTIC
    variables = {}
    for site, values in prediction.items():
        if site in (ROW, DRAW, STATISTIC):
            raise ValueError(
                f"site '{site}' has the name of a dimension of what is stored: give it another"
            )
        name = quote(site, safe=_SAFE)
        dims = (first, ROW, *(f"{name}_dim_{dim}" for dim in range(values.dim() - 2)))
        variables[name] = dims, as_numpy(values)
    attributes: dict[str, Any] = {"numbered": int(numbered)}
    if labels is not None:  # no coordinate: Zarr has no settled format of strings
        attributes["statistics"] = json.dumps(labels)
    return xarray.Dataset(variables, {ROW: rows.astype(np.int64)}, attributes)


def write(dataset: Any, folder: Path, kind: str, loader: int, rank: int, number: int) -> None:
    """Store the data set of a batch: in Zarr at the end of its rank's store, else in a file.

    Args:
        dataset: From :func:`dataset_of`.
        folder: Where the stores are.
        kind: ``"zarr"`` or ``"netcdf"``.
        loader: Number of the loader.
        rank: Of the process.
        number: Of the batch.
    """
    if kind == NETCDF:
        path = folder / f"predictions-{loader}-{rank}-{number:08d}{_ENDING[kind]}"
        dataset.to_netcdf(path, engine="h5netcdf")
        return
    path = folder / f"predictions-{loader}-{rank}{_ENDING[kind]}"
    if path.exists():
        dataset.to_zarr(path, append_dim=ROW, consolidated=False)
        return
    # A batch is a chunk, so that the next one does not rewrite it.
    chunks = {name: {"chunks": array.shape} for name, array in dataset.variables.items()}
    dataset.to_zarr(path, mode="w-", consolidated=False, encoding=chunks)


def stores_in(folder: Path, loader: int | None = None, rank: int | None = None) -> list[Path]:
    """List the stores in a folder, in the order of ranks and batches."""
    found = []
    for path in folder.glob("predictions-*"):
        name, _, ending = path.name.partition(".")
        numbers = name.split("-")[1:]
        if f".{ending}" not in _ENDING.values() or not all(n.isdigit() for n in numbers):
            continue
        key = [int(number) for number in numbers]
        if loader in (None, key[0]) and rank in (None, key[1]):
            found.append((key, path))
    return [path for _, path in sorted(found)]


def remove(paths: Sequence[Path]) -> None:
    """Remove stores."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def open_stores(folder: Path, loader: int, chunks: Any = None) -> Any:
    """Open the stores of all ranks as one data set, its rows in their order.

    Args:
        folder: Where they are.
        loader: Number of the loader.
        chunks: As in ``xarray.open_dataset``.

    Raises:
        FileNotFoundError: When there are none.
    """
    paths = stores_in(folder, loader)
    if not paths:
        raise FileNotFoundError(
            f"there are no predictions of loader {loader} in '{folder}': expected what a "
            "PredictionWriter has stored there"
        )
    kind = ZARR if paths[0].suffix == _ENDING[ZARR] else NETCDF
    xarray = needed_for(kind)
    options: dict[str, Any] = {"engine": "zarr", "consolidated": False}
    if kind == NETCDF:
        options = {"engine": "h5netcdf"}
    parts = [xarray.open_dataset(path, chunks=chunks, **options) for path in paths]
    whole = parts[0]
    if len(parts) > 1:
        whole = xarray.concat(
            parts, ROW, data_vars="minimal", coords="minimal", compat="override", join="override"
        )
        if chunks is None:  # it is in memory now
            for part in parts:
                part.close()
    quoted = [name for name in (*whole.variables, *whole.dims) if "%" in name]
    whole = whole.rename({name: unquote(name) for name in quoted})
    if not whole.attrs.pop("numbered"):
        whole = whole.assign_coords({ROW: np.arange(whole.sizes[ROW])})
    elif (np.diff(whole[ROW].values) < 0).any():
        whole = whole.isel({ROW: np.argsort(whole[ROW].values, kind="stable")})
    labels = whole.attrs.pop("statistics", None)
    return whole if labels is None else whole.assign_coords({STATISTIC: json.loads(labels)})
