"""The log-density of a model at draws of its global latents, summed over batches."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask

from pyro_lightning.batch_runs import Draws, HowToRun, Ready
from pyro_lightning.draw_runs import Layout
from pyro_lightning.given_runs import GivenMessenger, Sites, is_observation, sites_of_run
from pyro_lightning.posterior import stands_in
from pyro_lightning.prepared import prepared
from pyro_lightning.rows import data_of
from pyro_lightning.summed_out import is_summed_out, summed_log_likelihood

_LEAST_BATCHES = 4  # whose differences tell the standard error
_Terms = tuple[torch.Tensor, torch.Tensor]  # outside and inside the data plate


class Estimate(NamedTuple):
    r"""An estimate of :math:`\log p(x, \theta_s)` for S draws.

    Attributes:
        log_joint: ``(S,)``, in nats, a sum over N observations.
        standard_error: Of what tells the draws apart; 0 where all rows were seen at each.
        rows: At how many rows each draw was evaluated.
    """

    log_joint: torch.Tensor
    standard_error: float
    rows: int


class LogJoint:
    """The log-density of a model at draws of its global latents.

    Args:
        module: A ``PyroSVIModule`` that has trained.
        draws: Global latents by site, ``(S, *shape of the site)``.
    """

    def __init__(self, module: Any, draws: Mapping[str, torch.Tensor]) -> None:
        self.module, self.draws = module, draws
        self.count = len(next(iter(draws.values())))
        self.size = module._whole_size()
        self.how = HowToRun()

    def all_rows(self, batches: Iterable[Any]) -> Estimate:
        """Sum over all rows at each draw."""
        outside, inside, rows = torch.zeros(()), torch.zeros(()), 0
        for batch in batches:
            outside, of_batch = self._at_draws(batch)
            inside = inside + of_batch
            rows += self._rows(batch)
        self._check_rows(rows)
        return Estimate(outside + inside, 0.0, rows)

    def some_rows(self, batches: Iterable[Any], max_rows: int) -> Estimate:
        """Sum a first-order expansion over all rows, and what is left of it over some."""
        discrete = [name for name, draw in self.draws.items() if not draw.is_floating_point()]
        if discrete:
            raise ValueError(
                f"max_rows needs gradients, and the latents {', '.join(map(repr, discrete))} are "
                "discrete: leave max_rows out"
            )
        centre = {name: draw.mean(0) for name, draw in self.draws.items()}
        offsets = _flat({name: draw - centre[name] for name, draw in self.draws.items()})
        outside, expanded = torch.zeros(()), torch.zeros(())
        total, rows, left, seen = 0, [], [], torch.zeros(0, dtype=torch.long)
        whole = 0
        for number, batch in enumerate(batches):
            size = self._rows(batch)
            if number == 0:
                whole = -(-self.size // size)
                asked = max(-(-max_rows // size), _LEAST_BATCHES)
                seen = torch.randperm(whole, device="cpu")[:asked]
            value, gradient = self._expansion(batch, centre)
            of_batch = value + offsets @ gradient
            expanded, total = expanded + of_batch, total + size
            if number in seen or number == 0:
                outside, exact = self._at_draws(batch)
                if number in seen:
                    rows.append(size)
                    left.append(exact - of_batch)
        self._check_rows(total)
        return Estimate(
            outside + expanded + self.size / sum(rows) * torch.stack(left).sum(0),
            _standard_error(torch.stack(left), torch.tensor(rows), whole, self.size),
            sum(rows),
        )

    def _check_rows(self, rows: int) -> None:
        if rows != self.size:
            raise ValueError(
                f"the data hold {rows} rows, and the posterior is of the N = {self.size} of the "
                "training set: give the datamodule or loader that trained it, with "
                "drop_last=False"
            )

    def _rows(self, batch: Any) -> int:
        return int(self.module.num_rows(data_of(batch)))

    def _at_draws(self, batch: Any) -> _Terms:
        """Sum the terms outside and inside the data plate at each draw, unscaled."""
        with self._ready(batch) as ready:
            self.how.find_out(lambda: ready.why_not_at_once() is None)
            sites = {name: site for name, site in ready.sites.items() if _has_terms(site)}
            summed: torch.Tensor | None = None
            if is_summed_out(ready):
                inside = {name: site for name, site in sites.items() if self._is_inside(site)}
                rows = summed_log_likelihood(ready, self._of_summed(inside, ready), self.how)
                summed = torch.stack([each.double().sum(1) for each in rows.values()]).sum(0).cpu()
                sites = {name: site for name, site in sites.items() if name not in inside}
            layouts = {name: Layout(terms_of(site), 0) for name, site in sites.items()}

            def sums(draws: Draws, count: int, at_once: bool) -> dict[str, torch.Tensor]:
                terms = ready.model.read(terms_of, layouts, draws, count, at_once)
                return {name: each.reshape(count, -1).sum(1) for name, each in terms.items()}

            parted = self._parted(ready.in_chunks(sums, self.how), ready)
            return parted if summed is None else (parted[0], summed)

    def _is_inside(self, site: Any) -> bool:
        module = self.module
        return stands_in(site, module._data_plates) or site["name"] in module._scale_sites

    def _of_summed(self, inside: Sites, ready: Ready) -> Sites:
        """Return the observed sites of a model whose latents of rows are summed out."""
        seen = {name: site for name, site in inside.items() if is_observation(site)}
        scale = self.module._known_size() / ready.rows
        for name, site in inside.items():
            if site["is_observed"] and name not in seen:
                raise ValueError(
                    f"'{name}' is a pyro.factor in the data plate of a model whose latents are "
                    "summed out: weights of its draws are not computed"
                )
            # The likelihoods of rows come without scales of the model's own.
            own = torch.as_tensor(site["scale"], dtype=torch.double).cpu()
            if not torch.allclose(own, torch.full_like(own, scale)):
                raise ValueError(
                    f"site '{name}' has a scale of its own, and latents are summed out: weights of "
                    "draws of such a model are not computed"
                )
        return seen

    def _expansion(
        self, batch: Any, centre: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the terms inside the data plate at the centre; returns their gradient as well."""
        values = {name: value.clone().requires_grad_() for name, value in centre.items()}
        with self._ready(batch) as ready, torch.enable_grad():
            if is_summed_out(ready):
                raise ValueError(
                    "max_rows needs gradients, which are not taken of a likelihood whose discrete "
                    "latents are summed out: leave max_rows out"
                )
            sites = sites_of_run(ready.model.run, GivenMessenger(values))
            sums = {name: terms_of(site).sum() for name, site in sites.items() if _has_terms(site)}
            _, inside = self._parted(sums, ready)
            found = torch.autograd.grad(inside, list(values.values()), allow_unused=True)
        gradients = {
            name: (torch.zeros_like(value) if gradient is None else gradient)[None]
            for (name, value), gradient in zip(values.items(), found, strict=True)
        }
        return inside.detach(), _flat(gradients)[0]

    def _parted(self, sums: Mapping[str, torch.Tensor], ready: Ready) -> _Terms:
        """Add up the sums of sites outside the data plate, and those of sites inside, unscaled."""
        zero = torch.zeros((), dtype=torch.double)
        outside, inside = zero, zero
        for name, total in sums.items():
            if self._is_inside(ready.sites[name]):
                inside = inside + total.cpu()
            else:
                outside = outside + total.cpu()
        return outside, inside * (ready.rows / self.module._known_size())

    @contextmanager
    def _ready(self, batch: Any) -> Iterator[Ready]:
        with prepared(self.module, batch, self.draws, None, "guide", unobserved=False) as ready:
            for name, site in ready.sites.items():
                if not (site["is_observed"] or site["infer"].get("enumerate") == "parallel"):
                    refuse_local([name])
            yield ready


def refuse_local(names: Collection[str]) -> None:
    """Refuse latents of rows, for which there is no weight of the globals alone."""
    raise ValueError(
        f"the latents {', '.join(map(repr, names))} stand in the data plate: the weight of a draw "
        "of the globals needs their integral for each row, and with a draw of them for each row "
        "the weights would be those of N more dimensions, whose k-hat is large for any guide. "
        "Discrete ones can be summed out by TraceEnum_ELBO. Check such a model by its predictions "
        "and by simulation_based_calibration"
    )


def _has_terms(site: Any) -> bool:
    return not site["infer"].get("_deterministic")


def terms_of(site: Any) -> torch.Tensor:
    """Compute the log-density of a site in double precision, with its scale and mask."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    terms = scale_and_mask(torch.as_tensor(log_prob).double(), site["scale"], site["mask"])
    return torch.as_tensor(terms)


def _standard_error(left: torch.Tensor, rows: torch.Tensor, whole: int, dataset_size: int) -> float:
    """Estimate the error of a sum over N rows from whole batches, chosen at random.

    Args:
        left: The terms of each batch at each draw, ``(batches, draws)``.
        rows: Rows of each batch.
        whole: How many batches there are in all.
        dataset_size: N.
    """
    per_row = left / rows[:, None]
    apart = per_row - per_row.mean(1, keepdim=True)  # what is common to all draws tells no weights
    missing = max(1 - len(rows) / whole, 0.0)
    variances = apart.var(0) / len(rows) * missing if missing else torch.zeros(())
    return float(dataset_size * variances.mean().sqrt())


def _flat(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Put the entries of all latents of a draw in one row, in double precision on the CPU."""
    return torch.cat([v.reshape(len(v), -1).double().cpu() for v in values.values()], 1)
