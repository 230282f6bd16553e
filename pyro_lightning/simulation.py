"""Data simulated from a model: latents from their prior, observations given them."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch.distributions import Distribution

from pyro_lightning.batches import count_rows, map_tensors
from pyro_lightning.handlers import is_subsample, observed
from pyro_lightning.params import complete_contexts, trainable_leaves
from pyro_lightning.posterior import stands_in
from pyro_lightning.states import preserved_buffers

Key = int | str


def simulate(
    module: Any, arrays: Any, places: Mapping[str, Key]
) -> tuple[dict[str, torch.Tensor], Any]:
    """Run a model forwards, from its prior to new observations.

    Args:
        module: A ``PyroSVIModule``; nothing of it changes.
        arrays: N rows as a batch has them; what is observed in them is replaced.
        places: Where the values of an observed site stand in ``arrays``: its place in a tuple, its
            key in a dict; 0 for a tensor alone.

    Returns:
        The latents outside the data plates, and the arrays with new observations.

    Raises:
        ValueError: For a model with trainable tensors of its own, for observed sites without a
            place, and for simulated values of another shape than the array has.
    """
    arrays = map_tensors(arrays, torch.Tensor.detach)
    rows = count_rows(arrays)
    args, kwargs = module.model_inputs(arrays)
    if module._dataset_size is None:
        module._dataset_size = rows
    plates = module._row_plates()
    with preserved_buffers(module), module._isolated() as handled, torch.enable_grad():
        model = poutine.uncondition(module._handler(rows)()(handled(module.model)))
        trace = complete_contexts(lambda: poutine.trace(model).get_trace(*args, **kwargs))
        nodes = trace.nodes.values()
        sites = [s for s in nodes if s["type"] == "sample" and not is_subsample(s)]
        _refuse_parameters(sites)
    seen = [s for s in sites if s["infer"].get("was_observed")]
    seen = observed([{**site, "is_observed": True} for site in seen])
    _check_places({site["name"] for site in seen}, places)
    simulated = {places[s["name"]]: (s["name"], s["value"].detach()) for s in seen}
    truth = {
        s["name"]: s["value"].detach()
        for s in sites
        if not s["infer"].get("was_observed") and not stands_in(s, plates)
    }
    return truth, _replaced(arrays, simulated)


def _refuse_parameters(sites: list[Any]) -> None:
    terms = [s["fn"].log_prob(s["value"]) for s in sites if isinstance(s["fn"], Distribution)]
    leaves = [leaf for term in terms for leaf in trainable_leaves(term)]
    if leaves:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise ValueError(
            f"the model has trainable tensors of shapes {shapes}, and a fit would move them away "
            "from where the data were simulated. Calibration is of latents: give each a prior by "
            "pyro.sample or PyroSample, or fix it by requires_grad_(False)"
        )


def _check_places(seen: set[str], places: Mapping[str, Key]) -> None:
    missing, unknown = sorted(seen.difference(places)), sorted(set(places).difference(seen))
    if missing or unknown:
        raise ValueError(
            "observed must name where the values of each observed site stand, as in "
            f"{{'y': 1}} for the second element of a batch. Missing: {missing or 'none'}; not "
            f"observed in the model: {unknown or 'none'}"
        )


def _replaced(arrays: Any, simulated: Mapping[Key, tuple[str, torch.Tensor]]) -> Any:
    if isinstance(arrays, torch.Tensor):
        items: dict[Any, Any] = {0: arrays}
    else:
        items = dict(arrays) if isinstance(arrays, Mapping) else dict(enumerate(arrays))
    for key, (name, value) in simulated.items():
        if key not in items:
            raise ValueError(
                f"observed says that '{name}' stands at {key!r}, but the arrays have "
                f"{', '.join(map(repr, items))}"
            )
        old = items[key]
        if [n for n in value.shape if n > 1] != [n for n in old.shape if n > 1]:
            raise ValueError(
                f"site '{name}' was simulated with shape {tuple(value.shape)}, but the array at "
                f"{key!r} has {tuple(old.shape)}"
            )
        items[key] = value.reshape(old.shape).to(old)
    if isinstance(arrays, torch.Tensor):
        return items[0]
    return items if isinstance(arrays, Mapping) else tuple(items.values())


def rank_among(draws: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Count how many of L draws lie below a value, of equal ones a random part.

    Args:
        draws: ``(L, *shape)``.
        truth: ``(*shape)``.

    Example:
        >>> rank_among(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(2.5))
        tensor(2)
    """
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + (torch.rand(below.shape) * (equal + 1)).long()
