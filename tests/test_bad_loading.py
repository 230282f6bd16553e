"""Whatever is passed to what reads results: the right ones, or an error that names the cause.

As in ``test_bad_inputs.py``; about 260 examples, the same each time.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro.infer.autoguide import AutoDelta
from support import no_validation, quiet_trainer
from test_bad_inputs import (
    BATCHES,
    JUNK,
    POINT,
    B,
    N,
    X,
    columns,
    elements,
    examples,
    result_or_named,
)

from pyro_lightning import ArrayDataModule, AtomicCheckpointIO, PyroSVIModule

pytestmark = [
    no_validation,
    pytest.mark.filterwarnings("ignore:Encountered NaN"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays"),
]

KEPT = 7.25


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint whose guide is at a point of its own."""
    path = tmp_path_factory.mktemp("saved") / "fit.ckpt"
    svi = PyroSVIModule(columns, POINT, dataset_size=N)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(svi, datamodule=ArrayDataModule((X, X), batch_size=B))
    svi.guide.weight.data.fill_(KEPT)
    trainer.save_checkpoint(path)
    return path


LOADING = {
    "checkpoint_path": st.sampled_from(["none.ckpt", "/", "\0", "x" * 300]),
    "map_location": st.sampled_from([None, "cpu", torch.device("cpu"), "nowhere", "cuda:99"]),
    "hparams_file": st.sampled_from([None, "none.yaml", "none.csv", "none"]),
    "strict": st.sampled_from([None, True, False]),
    "weights_only": st.sampled_from([None, True, False]),
    "model": st.sampled_from([columns, torch.nn.Linear, lambda x, y: None]),
    "guide": st.sampled_from([POINT, AutoDelta, columns, int]),
    "data_plate": st.sampled_from(["data", "rows", {"data": N}, {"data": N + 1}]),
    "dataset_size": st.integers(-1, 40),
    "typo": st.none(),
}


@pytest.mark.parametrize("argument", LOADING)
def test_arguments_of_load_from_checkpoint(argument, saved):
    @examples(12)
    @given(st.one_of(LOADING[argument], JUNK))
    def holds(value):
        def run():
            usual = {"checkpoint_path": saved, "model": columns, "guide": POINT}
            warnings.simplefilter("ignore")  # of files of hyperparameters that are not there
            svi = PyroSVIModule.load_from_checkpoint(**{**usual, argument: value})
            return svi, svi.posterior_samples(2)["weight"]

        # A model or guide that is another: its latents are missing, or it does not run.
        also = {"model": ["model"], "guide": ["guide"], "data_plate": ["N ="]}
        also["checkpoint_path"] = ["checkpoint", "file", "path"]
        try:
            found = result_or_named(run, argument, repr(value), *also.get(argument, []))
        except OSError as error:
            assert argument == "checkpoint_path" and value in str(error)
            return
        if found is None:
            return
        svi, draws = found[0]
        assert draws.tolist() == [KEPT, KEPT]
        stated = value["data"] if isinstance(value, dict) and argument == "data_plate" else None
        stated = value if argument == "dataset_size" else stated
        assert svi.dataset_size == (N if stated is None else int(stated))

    holds()


# -- draws -----------------------------------------------------------------------------------------


def effects(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def computed(x, y):
    slope = pyro.param("slope", torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, 1e-6))


def test_batches_to_draw_of():
    svi = PyroSVIModule(effects, computed, dataset_size=N)
    svi.loss((X, X))

    @examples(60)
    @given(BATCHES)
    def holds(batch):
        found = result_or_named(
            lambda: svi.posterior_samples(2, batch=batch), "batch", "site", "argument", "row"
        )
        if found is None or batch is None:
            return
        x = torch.as_tensor(elements(batch)[0]).double()
        draws = found[0]["z"].double()
        assert draws.shape == (2, len(x))
        torch.testing.assert_close(draws, (2 * x).expand(2, -1), rtol=1e-4, atol=1e-4)

    holds()


# -- files and failed batches ----------------------------------------------------------------------

CONTENTS = st.dictionaries(st.text("ab", max_size=2), JUNK, max_size=3)


def test_what_a_checkpoint_file_may_hold(tmp_path):
    @examples(40)
    @given(st.one_of(CONTENTS, JUNK))
    def holds(contents):
        path = tmp_path / "any.ckpt"

        def run():
            AtomicCheckpointIO().save_checkpoint(contents, path)
            return AtomicCheckpointIO().load_checkpoint(path)

        found = result_or_named(run, "checkpoint")
        if found is not None:
            assert str(found[0]) == str(contents)  # as text, in which NaN equals NaN

    holds()


@pytest.mark.parametrize("argument", ["path", "map_location", "weights_only"])
def test_arguments_of_reading_a_file(argument, saved):
    @examples(15)
    @given(st.one_of(JUNK, st.just("nowhere")))
    def holds(value):
        try:
            found = result_or_named(
                lambda: AtomicCheckpointIO().load_checkpoint(**{"path": saved, argument: value}),
                argument,
            )
        except OSError as error:
            assert argument == "path" and str(value) in str(error)
            return
        if found is not None:
            assert found[0]["state_dict"].popitem()[1].item() == KEPT

    holds()
