"""Effect handlers that put the mini-batch scale N/B where it belongs."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from pyro_lightning.arguments import read_count, read_sizes
from pyro_lightning.plates import read_names


def is_subsample(msg: Any) -> bool:
    """Whether a message is the site by which a plate asks for its rows."""
    # Pyro has no public test for this; its own code compares the class name as well.
    return type(msg["fn"]).__name__ == "_Subsample"


class DataPlateMessenger(Messenger):
    r"""Multiplies the terms inside the data plate by N/B, once, whatever way the plate is written.

    .. math:: \text{scale} \leftarrow \text{scale} \cdot N / B

    for a site in a data plate or named in ``scale_sites``; a site outside keeps its own. A plate
    that says ``subsample_size=B`` is scaled by Pyro already and is left so, but is given the rows
    ``0 .. B-1`` of the batch, so that it does not draw ``randperm(N)``.

    Args:
        plates: Size N of each data plate, by name.
        batch_size: B, the rows of this batch.
        scale_sites: Size N for each site outside every data plate that is scaled too, by name.
        columns: Names of data plates over something else than the rows of a batch, the columns of
            a table: their B is the plate's own size, and they may cross the plate of the rows.
        size_in_model: The size that a plate over the rows may state in the model, where that is
            another than N: rows that cannot train are in it, and not in N.

    Attributes:
        sites: The messages of the ``pyro.sample`` statements that ran under the handler.
        params: The messages of the ``pyro.param`` statements, PyroModules' own among them.
        scaled_observations: How many observed sites among them were in a data plate or named.

    Raises:
        TypeError: For sizes that are no whole numbers.
        ValueError: When a data plate has a size that is neither N nor B, or other rows than B, or
            when two data plates over rows stand inside each other.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(0., 1.), obs=x)
        >>> with pyro.poutine.trace() as tr, DataPlateMessenger({"data": 10}, batch_size=2):
        ...     model(torch.zeros(2))
        >>> tr.trace.nodes["x"]["scale"]
        5.0

    Source: Hoffman et al. 2013, "Stochastic variational inference"; Pyro's SVI tutorial, part II.
    """

    def __init__(
        self,
        plates: Mapping[str, int],
        batch_size: int,
        scale_sites: Mapping[str, int] | None = None,
        columns: Collection[str] = (),
        size_in_model: int | None = None,
    ) -> None:
        super().__init__()
        self.plates = read_sizes(plates, "plates")
        self.size_in_model = size_in_model
        self.batch_size = read_count(batch_size, "batch_size")
        self.scale_sites = {} if scale_sites is None else read_sizes(scale_sites, "scale_sites")
        self.columns = frozenset(read_names(columns, "columns"))  # type: ignore[arg-type]
        self.sites: list[Any] = []
        self.params: list[Any] = []
        self.scaled_observations = 0

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            if msg["name"] in self.columns:
                self._check_columns(msg)
            elif msg["name"] in self.plates:
                self._give_rows(msg)
            return
        frames = [frame for frame in msg["cond_indep_stack"] if frame.name in self.plates]
        over_rows = [frame for frame in frames if frame.name not in self.columns]
        if len(over_rows) > 1:
            names = " and ".join(f"'{frame.name}'" for frame in over_rows)
            self._refuse(
                f"site '{msg['name']}' stands in the data plates {names} at once and would be "
                "scaled by N/B twice. Name only the plate over the rows of a batch in data_plate, "
                "or state the size of each: data_plate={'rows': n_rows, 'columns': n_columns}."
            )
        for frame in over_rows:
            if frame.size not in (self.batch_size, -1):
                self._refuse(
                    f"plate '{frame.name}' holds {frame.size} rows at site '{msg['name']}', but "
                    f"this batch holds B = {self.batch_size}. A plate that is made beforehand "
                    f"keeps its rows: write pyro.plate('{frame.name}', len(x)) in the model itself."
                )
        for frame in frames:
            # A frame whose full size exceeds its size was scaled by Pyro's own plate.
            if frame.full_size is None or frame.full_size == frame.size:
                # Plates that take any size have none of their own (-1): the rows are the batch's.
                if frame.size <= 0 and frame.name in self.columns:
                    self._refuse(f"plate '{frame.name}' must be given its size in the model.")
                size = frame.size if frame.size > 0 else self.batch_size
                msg["scale"] = msg["scale"] * (self.plates[frame.name] / size)
            elif frame in over_rows and frame.full_size == self.size_in_model:
                msg["scale"] = msg["scale"] * (self.plates[frame.name] / frame.full_size)
        named = msg["name"] in self.scale_sites
        if named and not frames:
            msg["scale"] = msg["scale"] * (self.scale_sites[msg["name"]] / self.batch_size)
        if (named or over_rows) and msg["is_observed"] and not msg["infer"].get("_deterministic"):
            self.scaled_observations += 1

    def _refuse(self, problem: str) -> None:
        """Refuse a plate; a table of sites that is to show it goes on."""
        raise ValueError(f"{problem} svi.site_table(batch) lists every site.")

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_subsample(msg):
            self.sites.append(msg)

    def _pyro_post_param(self, msg: Any) -> None:
        self.params.append(msg)

    def _check_columns(self, msg: Any) -> None:
        size, known = msg["fn"].size, self.plates[msg["name"]]
        if size > known:
            self._refuse(
                f"plate '{msg['name']}' has size {size}, more than the {known} that data_plate "
                "states for it."
            )

    def _give_rows(self, msg: Any) -> None:
        name, size, rows = msg["name"], msg["fn"].size, msg["value"]
        dataset_size, batch_size = self.plates[name], self.batch_size
        asked = msg["fn"].subsample_size
        if rows is not None:
            asked = len(rows)
        elif asked is None:
            asked = size
        if size not in (dataset_size, batch_size, self.size_in_model) or asked != batch_size:
            self._refuse(
                f"plate '{name}' has size {size} and holds {asked} rows, but the data set has "
                f"N = {dataset_size} and this batch B = {batch_size} rows. Write "
                f"pyro.plate('{name}', len(x)) with x a tensor of the batch, or "
                f"pyro.plate('{name}', {dataset_size}, subsample_size=len(x)). A plate over "
                "columns needs its own size: data_plate={'rows': n_rows, 'columns': n_columns}."
            )
        elif rows is None:
            msg["value"] = torch.arange(batch_size, device=msg["fn"].device)


def observed(sites: Iterable[Any]) -> list[Any]:
    """Keep the observed sites; ``pyro.deterministic`` statements are not observations."""
    return [s for s in sites if s["is_observed"] and not s["infer"].get("_deterministic")]
