"""The few rows of its first batch that a module keeps, to run guide and model without data."""

from typing import Any, NamedTuple

import torch

from pyro_lightning.batches import first_rows, repeated_rows
from pyro_lightning.first_run import run_once
from pyro_lightning.states import preserved_state


class FewRows(NamedTuple):
    """Rows of a batch, and how many of them guide and model are run on.

    Attributes:
        data: Two rows; all of the batch where its rows are counted by the user, or where neither
            two rows nor these in the place of all will do.
        shown: How many rows the guide is shown to draw latents that do not depend on them; None
            for those that there are.
        built: How many rows guide and model are run on to make their parameters. As many as in the
            batch, if they run: ``AutoGaussian`` has parameters as many as rows, up to its rank.
    """

    data: Any
    shown: int | None = None
    built: int | None = None

    def repeated(self, rows: int | None) -> Any:
        """Repeat the rows until there are as many as asked for."""
        return self.data if rows is None else repeated_rows(self.data, rows)


def keep_few_rows(module: Any, data: Any, counted: bool) -> FewRows:
    """Take the first two rows of a batch, if guide and model run on them.

    Args:
        module: A ``PyroSVIModule`` whose parameters exist.
        data: A batch, without row numbers.
        counted: Whether the rows are what tensors are indexed by, so that a batch can be cut.
    """
    if not counted:
        return FewRows(data)
    rows, few = module.num_rows(data), first_rows(data, 2)
    if rows <= 2:
        return FewRows(few, rows, rows)
    shown = 2 if _runs(module, few) else None
    built = rows if _runs(module, repeated_rows(few, rows)) else None
    if shown is None and built is None:
        return FewRows(data)
    return FewRows(few, shown or built, built or shown)


def _runs(module: Any, data: Any) -> bool:
    with torch.inference_mode(False), preserved_state(module), module._isolated() as handled:
        try:
            run_once(module, module._with_rows(data), handled)
        except Exception:  # such a batch is not the user's, and may be one that no model takes
            return False
    return True
