"""Lightning's callbacks that average parameters average those of the guide, and go on in a fit."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from resume_support import Fit, assert_equal, assert_goes_on, global_model, make, model, rows

from pyro_lightning import PyroSVIModule


class Iterates(Callback):
    """Keeps the parameters after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def mean(iterates):
    return {name: torch.stack([each[name] for each in iterates]).mean(0) for name in iterates[0]}


def fitted(callback, **options):
    iterates = Iterates()
    fit = Fit(make(), rows(), callbacks=[lambda: iterates, lambda: callback], **options)
    return dict(fit.svi.named_parameters()), iterates.seen


def test_the_mean_of_all_steps():
    found, iterates = fitted(WeightAveraging(), max_epochs=2)
    assert len(iterates) == 12 and len(found) == 4  # a loc and a scale of each latent
    # Running means and a mean of all differ by rounding.
    torch.testing.assert_close(found, mean(iterates), rtol=1e-5, atol=1e-6)


def test_the_mean_of_the_starts_of_epochs():
    found, iterates = fitted(StochasticWeightAveraging(0.05, swa_epoch_start=1), max_epochs=3)
    first = Fit(make(), rows(), max_epochs=0).state  # Lightning averages from before the first step
    starts = [{n: p.detach() for n, p in first.items()}, iterates[5], iterates[11]]
    torch.testing.assert_close(found, mean(starts), rtol=1e-5, atol=1e-6)


def test_a_loaded_module_has_the_average(tmp_path):
    fit = Fit(make(), rows(), callbacks=[partial(EMAWeightAveraging, decay=0.5)], max_epochs=2)
    fit.trainer.save_checkpoint(path := tmp_path / "fit.ckpt")
    loaded = PyroSVIModule.load_from_checkpoint(path, model=model)
    assert_equal(dict(loaded.named_parameters()), dict(fit.svi.named_parameters()))


@pytest.mark.parametrize("of", [model, global_model])
def test_an_average_goes_on(tmp_path, of):
    averaging = partial(EMAWeightAveraging, decay=0.9)
    hooks = "on_train_batch_end", "on_validation_end", "on_train_epoch_end"
    options = {"callbacks": [averaging], "max_epochs": 2, "val_check_interval": 4}
    assert_goes_on(tmp_path, make(of), rows(val=6), hooks, [1, 4, 8, 10], **options)
