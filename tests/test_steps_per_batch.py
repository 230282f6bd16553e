"""Several optimizer steps in one training step: the trajectory of one at a time, bit by bit."""

from datetime import timedelta
from functools import partial

import pytest
import torch
from compiled_models import regression_batch, rows
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from steps_support import ADAM, ROWS, B, assert_same_fit, fit, make, resumed
from support import no_validation, quiet_trainer
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from pyro_lightning import ArrayDataModule

EXACTLY = {"rtol": 0, "atol": 0}
OPTIMIZERS = {
    "Adam": ADAM,
    "AdamW": partial(torch.optim.AdamW, lr=0.05),
    "SGD": partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.1),
}
SCHEDULERS = {
    "epoch": partial(lr_scheduler.ExponentialLR, gamma=0.5),
    "step": lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.9), "interval": "step"},
    "every other step": lambda o: {
        "scheduler": lr_scheduler.ExponentialLR(o, 0.9),
        "interval": "step",
        "frequency": 2,
    },
    "every other epoch": lambda o: {
        "scheduler": lr_scheduler.ExponentialLR(o, 0.5),
        "frequency": 2,
    },
    "one cycle": lambda o: {
        "scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=60),
        "interval": "step",
    },
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
    "plateau of validation": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
        "monitor": "val_loss",
    },
}


@pytest.mark.parametrize("steps", [2, 3, 11, 16])
def test_a_fit_is_the_same_bit_by_bit(steps):
    assert_same_fit(fit(steps), fit(1), **EXACTLY)


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_last_batch_of_another_size_is_the_same(drop_last):
    options = {"count": ROWS + 3, "data": {"drop_last": drop_last}}
    assert_same_fit(fit(4, **options), fit(1, **options), **EXACTLY)


@no_validation
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_rows_are_the_same(name):
    options = {"model": rows, "optimizer": OPTIMIZERS[name]}
    assert_same_fit(fit(3, **options), fit(1, **options), **EXACTLY)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_the_same(name):
    optimizer = OPTIMIZERS[name]
    assert_same_fit(fit(3, optimizer), fit(1, optimizer), **EXACTLY)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_the_same(name):
    options = {"lr_scheduler": SCHEDULERS[name], "trainer": {"max_epochs": 4}}
    found, expected = fit(3, **options), fit(1, **options)
    assert_same_fit(found, expected, **EXACTLY)
    assert expected[1].optimizers[0].param_groups[0]["lr"] != 0.05  # it has moved


@pytest.mark.parametrize("most", [1, 4, 5, 12, 33])
def test_max_steps_counts_optimizer_steps_and_cuts_a_batch(most):
    options = {"trainer": {"max_epochs": -1, "max_steps": most}}
    found, expected = fit(3, **options), fit(1, **options)
    assert found[1].global_step == most
    assert_same_fit(found, expected, **EXACTLY)


def test_a_scheduler_that_watches_the_figures_of_steps_is_refused():
    def plateau(optimizer):
        watched = {"monitor": "train_loss_per_obs_step", "interval": "step"}
        return {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer), **watched}

    with pytest.raises(ValueError, match="steps_per_batch=3: not every step has a figure"):
        fit(3, lr_scheduler=plateau)


def test_a_scheduler_that_watches_what_is_not_logged_is_refused():
    def plateau(optimizer):
        return {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "nothing"}

    with pytest.raises(ValueError, match="watches 'nothing', which is not logged. Logged are: .*"):
        fit(3, lr_scheduler=plateau)


def logged(folder, steps, **options):
    logger = CSVLogger(folder, name=str(steps), flush_logs_every_n_steps=1)
    fit(steps, trainer={"logger": logger, "log_every_n_steps": 2}, **options)
    found = {}
    with open(f"{logger.log_dir}/metrics.csv") as file:
        names, *lines = [line.strip().split(",") for line in file]
    for line in lines:
        row = dict(zip(names, line, strict=True))
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


def test_loggers_get_the_same_figures_at_the_same_steps(tmp_path):
    found, expected = logged(tmp_path, 3), logged(tmp_path, 1)
    assert found.keys() == expected.keys()
    assert {"train_loss", "val_loss", "train_loss_per_obs_step"} <= found.keys()
    for name, rows_of_it in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in rows_of_it], name
        values = [[value for _, value in each] for each in (found[name], rows_of_it)]
        # Means over an epoch are added up in another order.
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-6, atol=0)


def test_epoch_figures_are_the_same_in_callback_metrics():
    (_, found), (_, expected) = fit(3), fit(1)
    metrics = [{n: float(v) for n, v in t.callback_metrics.items()} for t in (found, expected)]
    assert metrics[0].keys() == metrics[1].keys()
    assert {"train_loss", "val_loss", "train_loss_per_obs"} <= metrics[0].keys()
    for name in metrics[1]:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-6), name


class StepsOfValidation(Callback):
    """Keeps the global step of each validation."""

    def __init__(self):
        self.steps = []

    def on_validation_start(self, trainer, pl_module):
        self.steps.append(trainer.global_step)


def test_validation_within_an_epoch_comes_after_batches_of_the_loader():
    watch = StepsOfValidation()
    options = {"val_check_interval": 2, "callbacks": [watch], "num_sanity_val_steps": 0}
    fit(2, count=48, trainer={"max_epochs": 1, **options})
    assert watch.steps == [4, 8, 12]


def checkpoints(folder, steps, val=None, **options):
    keep = ModelCheckpoint(folder, save_top_k=-1, **options)
    data = {"val": val}
    fit(steps, count=48, data=data, trainer={"enable_checkpointing": True, "callbacks": [keep]})
    return {path.name: torch.load(path, weights_only=False) for path in folder.glob("*.ckpt")}


# Lightning says that the state is that after the step, as it is with automatic optimization.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("val", [None, regression_batch(4, rows=8)], ids=["", "validation"])
@pytest.mark.parametrize("when", [{"every_n_train_steps": 6}, {"every_n_epochs": 1}], ids=str)
def test_checkpoints_have_the_same_names_and_contents(tmp_path, val, when):
    folders = [tmp_path / "many", tmp_path / "one"]
    found, expected = (checkpoints(f, k, val, **when) for f, k in zip(folders, (3, 1), strict=True))
    assert len(expected) == (6 if "every_n_train_steps" in when else 3)
    assert found.keys() == expected.keys()
    for name in expected:
        for part in ("state_dict", "optimizer_states", "global_step", "epoch"):
            one, two = found[name][part], expected[name][part]
            torch.testing.assert_close(one, two, **EXACTLY)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"every_n_train_steps": 7}, "every_n_train_steps=6 or 9, or another multiple of 3"),
        ({"every_n_train_steps": 2}, "every_n_train_steps=3, or another multiple of 3"),
        ({"train_time_interval": timedelta(hours=1)}, "train_time_interval=...\\) is ignored"),
    ],
)
def test_checkpoints_that_would_be_left_out_are_refused(tmp_path, argument, message):
    with pytest.raises(ValueError, match=message):
        checkpoints(tmp_path, 3, **argument)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_a_warning_says_that_later_epochs_end_at_other_steps(tmp_path):
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=6)
    with pytest.warns(UserWarning, match="holds 2 steps and not steps_per_batch=3"):
        fit(3, trainer={"enable_checkpointing": True, "callbacks": [keep]})


@pytest.mark.parametrize("steps", [1, 3])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path, steps):
    options = {"data": {"shuffle": False}, "lr_scheduler": SCHEDULERS["step"]}
    whole = fit(steps, trainer={"max_epochs": 4}, **options)
    svi, trainer = fit(steps, trainer={"max_epochs": 2}, **options)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    state = torch.get_rng_state()

    again = resumed(steps, path, state, 4, **options)
    assert_same_fit(again, whole, **EXACTLY)


@pytest.mark.parametrize(("saved", "now"), [(3, 1), (1, 3), (3, 2)])
def test_a_fit_is_not_resumed_with_another_number_of_steps(tmp_path, saved, now):
    _, trainer = fit(saved, trainer={"max_epochs": 1})
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=f"steps_per_batch={saved}, and this module has {now}"):
        fit(now, ckpt=path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"gradient_clip_val": 1.0}, "gradient clipping is not supported for manual"),
        ({"accumulate_grad_batches": 2}, "gradient accumulation is not supported for manual"),
    ],
)
def test_lightning_refuses_what_it_does_itself(flag, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(3, trainer=flag)


@no_validation
def test_refuses_a_loader_whose_batches_are_not_divided():
    loader = DataLoader(TensorDataset(*regression_batch(0, rows=40)), batch_size=10)
    with pytest.raises(ValueError, match="steps_per_batch=3 does not divide the 10 rows"):
        quiet_trainer(max_epochs=1).fit(make(3), loader)


@no_validation
def test_a_loader_of_the_users_own_hands_over_whole_batches():
    loader = DataLoader(TensorDataset(*regression_batch(0, rows=40)), batch_size=12)
    svi, trainer = make(3), quiet_trainer(max_epochs=2)
    trainer.fit(svi, loader)
    assert trainer.global_step == 20


@pytest.mark.parametrize("steps", [0, -1])
def test_refuses_no_steps(steps):
    with pytest.raises(ValueError, match="steps_per_batch must be at least 1"):
        make(steps)


def test_the_datamodule_hands_over_whole_batches():
    module = make(3)
    data = ArrayDataModule(regression_batch(0, rows=40), batch_size=B)
    sizes = []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(len(batch[0]))

    quiet_trainer(max_epochs=1, callbacks=[Sizes()]).fit(module, datamodule=data)
    assert sizes == [12, 12, 12, 4]
