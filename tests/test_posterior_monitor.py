"""PosteriorMonitor logs what the guide says, draws it, and leaves the fit as it is."""

import csv
import sys
from functools import partial
from statistics import NormalDist

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from resume_support import ADAM, arrays, assert_goes_on, global_model, make, model, rows
from support import quiet_trainer

from pyro_lightning import ArrayDataModule, PosteriorMonitor, PyroSVIModule
from pyro_lightning.trace_plot import interval_figure


class Locations(Callback):
    """Keeps the guide's mean and sd of each entry at the end of each epoch, by the step."""

    def __init__(self):
        self.seen = {}

    def on_train_epoch_end(self, trainer, pl_module):
        guide = pl_module.guide
        self.seen[trainer.global_step] = [
            part.w.detach().clone() for part in (guide.locs, guide.scales)
        ]


def fit(*callbacks, model=global_model, steps_per_batch=1, **flags):
    torch.manual_seed(0)
    svi = PyroSVIModule(model, optimizer=ADAM, steps_per_batch=steps_per_batch)
    trainer = quiet_trainer(**{"max_epochs": 3, "callbacks": [*callbacks], **flags})
    trainer.fit(svi, datamodule=ArrayDataModule(arrays(), batch_size=4))  # 6 steps an epoch
    return svi, trainer


def logged(folder):
    with open(folder / "lightning_logs/version_0/metrics.csv") as file:
        table = list(csv.DictReader(file))
    return [row for row in table if any(row[n] for n in row if n.startswith("posterior/"))]


def test_figures_are_those_of_the_guide(tmp_path):
    seen = Locations()
    fit(PosteriorMonitor(num_samples=4000), seen, logger=CSVLogger(tmp_path))
    table = logged(tmp_path)
    assert [int(row["step"]) + 1 for row in table] == list(seen.seen) == [6, 12, 18]
    tail = NormalDist().inv_cdf(0.05)
    for row, (loc, sd) in zip(table, seen.seen.values(), strict=True):
        for place in range(2):
            found = {n: float(row[f"posterior/w[{place}]_{n}"]) for n in ("mean", "sd", "q5")}
            mean, scale = float(loc[place]), float(sd[place])
            # Of 4,000 draws the mean is known to 1.6% of a sd, the sd to 1.1%, the quantile to 3%.
            assert found["mean"] == pytest.approx(mean, abs=0.07 * scale)
            assert found["sd"] == pytest.approx(scale, rel=0.05)
            assert found["q5"] == pytest.approx(mean + tail * scale, abs=0.12 * scale)


def test_the_random_numbers_of_a_fit_stay_the_same():
    plain, _ = fit()
    monitored, _ = fit(PosteriorMonitor(every_n_steps=1))
    torch.testing.assert_close(monitored.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("steps_per_batch", "steps"), [(1, [4, 8, 12, 16]), (4, [4, 10, 12, 16])])
def test_steps_are_those_of_the_optimizer(tmp_path, steps_per_batch, steps):
    # Batches of the loader hold 4 and 2 of them, in an epoch of 6.
    monitor = PosteriorMonitor(every_n_steps=4, num_samples=10)
    fit(monitor, logger=CSVLogger(tmp_path), steps_per_batch=steps_per_batch)
    assert [int(row["step"]) + 1 for row in logged(tmp_path)] == steps


def many(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ w).sum(-1), sd), obs=y)


def test_the_first_entries_of_chosen_sites_are_followed(tmp_path):
    monitor = PosteriorMonitor(["sd", "w"], max_entries=4, num_samples=10, interval=0.5)
    fit(monitor, model=many, logger=CSVLogger(tmp_path), max_epochs=1)
    names = {name for name in logged(tmp_path)[0] if name.startswith("posterior/")}
    entries = ["sd", "w[0,0]", "w[0,1]", "w[0,2]", "w[1,0]"]
    kinds = ["mean", "sd", "q25", "q75"]
    assert names == {f"posterior/{entry}_{kind}" for entry in entries for kind in kinds}


def test_latents_of_rows_are_left_out(tmp_path):
    fit(PosteriorMonitor(num_samples=10), model=model, logger=CSVLogger(tmp_path), max_epochs=1)
    names = {name.split("_")[0] for name in logged(tmp_path)[0] if name.startswith("posterior/")}
    assert names == {"posterior/w[0]", "posterior/w[1]"}


# -- figures -----------------------------------------------------------------------------------


def test_the_figure_shows_the_intervals_over_steps(tmp_path):
    monitor = PosteriorMonitor(num_samples=10)
    fit(monitor, logger=CSVLogger(tmp_path))
    table = logged(tmp_path)
    kept = monitor._trail.values()
    assert kept[:, 0].tolist() == [6, 12, 18]
    means = [[float(row[f"posterior/w[{place}]_mean"]) for place in (0, 1)] for row in table]
    torch.testing.assert_close(kept[:, 1:3], torch.tensor(means, dtype=torch.float64))
    image = (tmp_path / "lightning_logs/version_0/posterior.png").read_bytes()
    assert image.startswith(b"\x89PNG")


def test_a_panel_holds_line_and_band_of_a_latent():
    steps = torch.tensor([1, 2, 3])
    means = torch.tensor([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0]])
    figure = interval_figure(["a", "b"], steps, means, means - 1, means + 2)
    second = figure.axes[1]
    assert second.get_title() == "b"
    assert second.lines[0].get_xydata().tolist() == [[1, 5], [2, 6], [3, 7]]
    corners = second.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == 4 and corners[:, 1].max() == 9


class Figures(Logger):
    """A logger whose experiment takes figures, as TensorBoard's does."""

    name, version = "figures", 0

    def __init__(self):
        super().__init__()
        self.added, self.experiment = [], self

    def add_figure(self, tag, figure, global_step):
        self.added.append((tag, len(figure.axes), global_step))

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_figures_go_to_loggers_that_take_them():
    logger = Figures()
    fit(PosteriorMonitor(num_samples=10, figure_every=2), logger=logger)
    assert logger.added == [("posterior", 2, 12), ("posterior", 2, 18)]


def test_tensorboard_holds_scalars_and_figure(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(PosteriorMonitor(num_samples=10), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(tmp_path / "lightning_logs/version_0"))
    events.Reload()
    assert [each.step for each in events.Scalars("posterior/w[0]_mean")] == [5, 11, 17]
    assert [each.step for each in events.Images("posterior")] == [18]


def test_the_figure_goes_on_with_the_fit(tmp_path):
    made = []

    def monitor():
        made.append(PosteriorMonitor(num_samples=10))
        return made[-1]

    data, hooks = rows(), ("on_train_epoch_start",)
    assert_goes_on(tmp_path, make(global_model), data, hooks, at=(2,), callbacks=[monitor])
    whole, again = (each._trail.values() for each in made)
    assert len(whole) == 3
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-lightning\[plots\]'"):
        PosteriorMonitor()
    PosteriorMonitor(figure_every=0)


# -- what is refused ---------------------------------------------------------------------------


def test_a_site_that_the_guide_does_not_draw_is_refused():
    with pytest.raises(ValueError, match="follow 'v', which is no global latent.*'w'"):
        fit(PosteriorMonitor(["v"]))


def test_a_model_without_global_latents_is_refused():
    def local(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="no global latents"):
        fit(PosteriorMonitor(), model=local)


def test_another_module_is_refused():
    class Other(LightningModule):
        pass

    with pytest.raises(TypeError, match="serves a PyroSVIModule, got Other"):
        PosteriorMonitor().setup(quiet_trainer(), Other(), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"interval": 1.0}, "interval must lie"), ({"num_samples": 1}, "num_samples must be")],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        partial(PosteriorMonitor, **arguments)()
