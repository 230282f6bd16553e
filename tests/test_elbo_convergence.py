"""ELBOConvergence stops noisy fits where they are stationary, and leaves the mean of iterates."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from resume_support import ADAM, assert_goes_on, global_model, make, rows
from support import normal_mean, quiet_trainer

from pyro_lightning import ArrayDataModule, ELBOConvergence, KLAnnealing, PyroSVIModule

N = 200
X = torch.randn(N, generator=torch.Generator().manual_seed(2)) + 1.0
MEAN, SD = float(X.sum() / (100 + N)), (100 + N) ** -0.5


class Iterates(Callback):
    """Keeps the parameters after each step, by its number."""

    def __init__(self):
        self.seen, self.validated = {}, {}

    def _now(self, pl_module):
        return torch.stack([p.detach().clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[trainer.global_step] = self._now(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validated[trainer.global_step] = self._now(pl_module)


def fit(*callbacks, lr=0.05, epochs=200, **options):
    torch.manual_seed(0)
    seen = Iterates()
    svi = PyroSVIModule(normal_mean, **{"optimizer": partial(torch.optim.Adam, lr=lr), **options})
    flags = {"max_epochs": epochs, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(callbacks=[seen, *callbacks], **flags)
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=20, val=X[:20]))
    return svi, trainer, seen


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The callback, module and Trainer of a fit, its iterates, and a checkpoint on the way."""
    path = tmp_path_factory.mktemp("fit") / "late.ckpt"

    class Late(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if stop.averaged == 50:
                trainer.save_checkpoint(path)

    stop = ELBOConvergence(window=100)
    return stop, *fit(stop, Late()), path


def test_it_stops_before_the_fit_would_have(stopped):
    stop, _, trainer, *_ = stopped
    assert stop.converged
    assert trainer.global_step < 2000


def test_the_result_is_the_mean_of_the_iterates_from_the_first_stationary_one(stopped):
    stop, svi, trainer, seen, _ = stopped
    late = [seen.seen[step] for step in range(stop.stationary_at, trainer.global_step + 1)]
    assert stop.averaged == len(late) >= 100
    found = torch.stack([p.detach() for p in svi.parameters()])
    torch.testing.assert_close(found, torch.stack(late).mean(0), rtol=1e-4, atol=1e-5)


def test_the_mean_is_nearer_to_the_posterior_than_its_iterates(stopped):
    stop, svi, trainer, seen, _ = stopped
    late = torch.stack(
        [seen.seen[step] for step in range(stop.stationary_at, trainer.global_step + 1)]
    )
    loc = float(svi.guide.locs.mu.detach())
    # Iterates at this learning rate stray from the optimum by a large part of a sd, the mean by no
    # more than a few of the standard errors that are asked for.
    typical = (late[:, 0] - MEAN).square().mean().sqrt()
    assert abs(loc - MEAN) < min(0.3 * SD, float(typical))
    assert float(svi.guide.scales.mu.detach()) == pytest.approx(SD, rel=0.15)


def test_validation_is_of_the_mean_so_far(stopped):
    stop, _, trainer, seen, _ = stopped
    steps = [step for step in seen.validated if step > stop.stationary_at]
    assert steps
    for step in steps:
        late = [seen.seen[each] for each in range(stop.stationary_at, step + 1)]
        expected = torch.stack(late).mean(0)
        torch.testing.assert_close(seen.validated[step], expected, rtol=1e-4, atol=1e-5)
    before = max(step for step in seen.validated if step < stop.stationary_at)
    assert torch.equal(seen.validated[before], seen.seen[before])


def test_figures_are_logged(stopped):
    stop, _, trainer, *_ = stopped
    found = {name: float(trainer.callback_metrics[name]) for name in ("r_hat", "ess", "mcse")}
    assert found["r_hat"] < 1.1 and found["ess"] >= 20 and found["mcse"] <= 0.05


def test_a_checkpoint_holds_the_mean_as_its_weights(stopped):
    stop, _, _, seen, path = stopped
    svi = PyroSVIModule.load_from_checkpoint(path, model=normal_mean)
    late = [seen.seen[stop.stationary_at + number] for number in range(50)]
    found = torch.stack([p.detach() for p in svi.parameters()])
    torch.testing.assert_close(found, torch.stack(late).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"steps_per_batch": 2}])
def test_a_fit_goes_on_in_each_phase(tmp_path, options):
    # A window so small that both phases fit in. The second checkpoint is of a validation, when the
    # mean stands in the place of the iterate.
    stop = partial(ELBOConvergence, window=20, r_hat=3.0, ess=1.0, mcse=1.0)
    found = assert_goes_on(
        tmp_path,
        make(global_model, **options),
        rows(val=5),
        hooks=("on_train_batch_end", "on_validation_batch_end"),
        at=(1, 63, -20),
        callbacks=[stop],
        max_epochs=40,
    )
    held = next(c for c in found.trainer.callbacks if isinstance(c, ELBOConvergence))
    assert held.converged and held.averaged > 20


def test_parameters_of_rows_keep_their_last_value():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.z = pl_module.guide.locs.z.detach().clone()
            self.mu = pl_module.guide.locs.mu.detach().clone()

    torch.manual_seed(0)
    keep, stop = Keep(), ELBOConvergence(window=20, r_hat=3.0, ess=1.0, mcse=1.0)
    svi = PyroSVIModule(model, optimizer=ADAM)
    trainer = quiet_trainer(max_epochs=30, callbacks=[stop, keep])
    trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=50))
    assert stop.converged
    assert torch.equal(svi.guide.locs.z.detach(), keep.z)
    assert not torch.equal(svi.guide.locs.mu.detach(), keep.mu)
    assert "guide.locs.z_unconstrained" not in stop._parameters


def test_as_many_entries_are_tracked_as_are_said():
    stop = ELBOConvergence(window=20, max_tracked=3)

    def model(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([7]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(), 1.0), obs=x)

    with pytest.warns(UserWarning, match="before its iterates were stationary"):
        svi = PyroSVIModule(model)
        trainer = quiet_trainer(max_epochs=1, callbacks=[stop])
        trainer.fit(svi, datamodule=ArrayDataModule(X, batch_size=20))
    # Of 14 entries, 7 locations and 7 scales, those of 0, 4 and 9.
    found = {name: places.tolist() for name, places in stop._tracked.places.items()}
    assert found == {
        "guide.locs.w_unconstrained": [0, 4],
        "guide.scales.w_unconstrained": [2],
    }
    assert stop._trail.values().shape == (10, 3)


def test_a_fit_that_has_not_come_to_rest_goes_on_to_its_end():
    stop = ELBOConvergence(window=50)
    with pytest.warns(UserWarning, match="before its iterates were stationary.*R-hat"):
        svi, _, seen = fit(stop, lr=1e-4, epochs=30)
    assert not stop.converged and stop.stationary_at is None
    assert torch.equal(seen.seen[300], torch.stack([p.detach() for p in svi.parameters()]))


def test_another_learning_rate_begins_anew_with_a_warning():
    stop = ELBOConvergence(window=20, r_hat=5.0)
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    with (
        pytest.warns(UserWarning, match="the learning rate changes, and ELBOConvergence begins"),
        pytest.warns(UserWarning, match="before its iterates were stationary"),
    ):
        fit(stop, epochs=8, lr_scheduler=decay)
    assert len(stop._trail) == 10  # of the last epoch


def test_iterates_of_an_annealed_loss_do_not_count():
    stop = ELBOConvergence(window=20, r_hat=5.0, ess=1.0, mcse=1.0)
    fit(KLAnnealing(steps=120), stop, epochs=30)
    # The first step of weight 1 is the one after 120, and 0.95 of 30 entries are more than 20.
    assert stop.stationary_at == 121 + 29


def test_beside_weight_averaging_it_is_refused():
    with pytest.raises(ValueError, match="leave one out"):
        fit(ELBOConvergence(), EMAWeightAveraging(), epochs=1)


def test_beside_checkpoints_of_weights_alone_it_is_refused(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_weights_only=True)
    trainer = quiet_trainer(
        max_epochs=1, callbacks=[ELBOConvergence(), keep], enable_checkpointing=True
    )
    with pytest.raises(ValueError, match="Leave save_weights_only out"):
        trainer.fit(PyroSVIModule(normal_mean), datamodule=ArrayDataModule(X, batch_size=20))


def test_another_module_is_refused():
    class Other(LightningModule):
        pass

    with pytest.raises(TypeError, match="serves a PyroSVIModule, got Other"):
        ELBOConvergence().setup(quiet_trainer(), Other(), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r_hat": 1.0}, "r_hat must be above 1"),
        ({"ess": 0}, "ess must be"),
        ({"window": 10}, "window must be at least 20"),
        ({"mcse": -1}, "mcse must be"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        ELBOConvergence(**arguments)
