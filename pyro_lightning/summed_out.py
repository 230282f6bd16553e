"""The likelihood of each row where discrete latents are summed out."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree

from pyro_lightning.batch_runs import Draws, HowToRun, Ready
from pyro_lightning.draw_runs import DRAWS, draw_of
from pyro_lightning.given_runs import is_statement_of_value
from pyro_lightning.handlers import is_subsample
from pyro_lightning.masks import mask_of
from pyro_lightning.posterior import stands_in


def is_summed_out(ready: Ready) -> bool:
    """Whether a model has latents that ``TraceEnum_ELBO`` sums out, of which there are no draws."""
    return any(
        site["infer"].get("enumerate") == "parallel" and not site["is_observed"]
        for site in ready.sites.values()
    )


def summed_log_likelihood(
    ready: Ready, observed: Mapping[str, Any], how: HowToRun
) -> dict[str, torch.Tensor]:
    """Compute the log-likelihood of each row, discrete latents summed out, for all draws.

    Args:
        ready: A batch whose model can be run, with what was observed.
        observed: Its observed sites, by name.
        how: How draws are run.

    Returns:
        ``(S, B)`` by observed site; of sites that share a latent that is summed out, together,
        under their names joined by ``+``.

    Raises:
        ValueError: For an observed site outside every data plate.
    """
    model, names = ready.model, set(observed)
    for name, site in observed.items():
        if not stands_in(site, ready.plates):
            raise ValueError(
                f"observed site '{name}' stands in no data plate, so that what the ELBO sums out "
                "cannot be told apart by row: let it stand in pyro.plate('data', len(x))"
            )

    def one(draws: Draws, at_once: bool, count: int) -> dict[str, torch.Tensor]:
        left_of = -1 - model.nesting - at_once
        enumerated = poutine.enum(model.run, first_available_dim=left_of)
        if not at_once:
            trace = poutine.trace(model.given(draws)(enumerated)).get_trace()
            return _of_rows(trace, names, ready.plates, (ready.rows,))
        with model.several(draws, count) as given:
            trace = poutine.trace(given(enumerated)).get_trace()
        return _of_rows(trace, names, ready.plates, (count, ready.rows))

    def run(draws: Draws, count: int, at_once: bool) -> dict[str, torch.Tensor]:
        if at_once:
            return one(draws, True, count)
        each = [one(draw_of(draws, number), False, 1) for number in range(count)]
        return {name: torch.stack([found[name] for found in each]) for name in each[0]}

    return ready.in_chunks(run, how)


def _of_rows(
    trace: Any, observed: set[str], plates: Iterable[str], shape: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """Sum out what is enumerated in a trace; returns log-likelihoods of the rows by site."""
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not is_subsample(s)}
    summed = [n for n, s in sites.items() if s["infer"].get("_enumerate_dim") is not None]
    wanted = {*summed, *(observed & sites.keys())}
    trace.compute_log_prob(site_filter=lambda name, _: name in wanted)
    trace.pack_tensors()
    symbols = trace.plate_to_symbol
    terms = {}
    for name in sites:
        if name in wanted and not is_statement_of_value(sites[name]):
            held = sites[name]["packed"]
            terms[name] = packed.scale_and_mask(held["unscaled_log_prob"], mask=held["mask"])
    sum_dims = {dim for term in terms.values() for dim in term._pyro_dims}
    sum_dims -= set(symbols.values())
    rows = [symbols[name] for name in plates if name in symbols]
    kept = [symbols.get(DRAWS, ""), *rows[:1]][-len(shape) :]

    def contracted(names: Iterable[str]) -> torch.Tensor:
        tree: OrderedDict[frozenset[str], list[Any]] = OrderedDict()
        for name in names:
            frames = sites[name]["cond_indep_stack"]
            stack = frozenset(symbols[f.name] for f in frames if f.vectorized and f.size > 1)
            tree.setdefault(stack, []).append(terms[name])
        whole = contract_tensor_tree(tree, sum_dims)
        return torch.stack([_kept(term, kept, shape) for e in whole.values() for term in e]).sum(0)

    found = {}
    for group in _connected(terms, sum_dims):
        seen = sorted(name for name in group if name in observed)
        if not seen:  # the probabilities of a latent that nothing observes, which sum to one
            continue
        latents = [name for name in group if name in summed]
        likelihood = contracted([*(name for name in group if name in observed), *latents])
        if any(torch.as_tensor(mask_of(sites[name])).logical_not().any() for name in latents):
            # With a mask the probabilities of K values sum to K: as in a sequence past its end.
            likelihood = likelihood - contracted(latents)
        found["+".join(seen)] = likelihood
    return found


def _connected(terms: Mapping[str, Any], dims: set[str]) -> list[set[str]]:
    """Group sites that share a dimension which is summed out."""
    groups: list[tuple[set[str], set[str]]] = []
    for name, term in terms.items():
        own, names = dims.intersection(term._pyro_dims), {name}
        apart = []
        for group, shared in groups:
            if own & shared:
                names, own = names | group, own | shared
            else:
                apart.append((group, shared))
        groups = [*apart, (names, own)]
    return [names for names, _ in groups]


def _kept(term: Any, kept: list[str], shape: tuple[int, ...]) -> torch.Tensor:
    """Sum what is packed over all dimensions but those that are kept, in their order."""
    dims = term._pyro_dims
    others = [at for at, dim in enumerate(dims) if dim not in kept]
    left = [dim for dim in dims if dim in kept]
    tensor = term.sum(others) if others else term
    order = [left.index(dim) for dim in kept if dim in left]
    tensor = tensor.permute(order)
    for at, dim in enumerate(kept):
        if dim not in left:
            tensor = tensor.unsqueeze(at)
    expanded: torch.Tensor = tensor.expand(shape)
    return expanded
