"""What a checkpoint holds: sizes, plates, and of the data two rows or none."""

import copy
import pickle
from collections import namedtuple
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from checkpoint_support import assert_equal_draws, load_into, move, save, seeded
from compiled_models import CASES
from pyro.infer.autoguide import AutoMultivariateNormal
from support import normal_mean, quiet_trainer
from torch.utils.data import DataLoader

from pyro_lightning import ArrayDataModule, IndexedDataset, PyroSVIModule
from pyro_lightning.formats import KEY, VERSION, blank, pack, unpack

N, B = 30, 10
X = torch.randn(N, generator=torch.Generator().manual_seed(0))


def fit(svi, data=None, ckpt_path=None, **flags):
    trainer = quiet_trainer(**{"max_epochs": 1, **flags})
    data = ArrayDataModule(X, batch_size=B) if data is None else data
    given = {"datamodule" if isinstance(data, ArrayDataModule) else "train_dataloaders": data}
    trainer.fit(svi, **given, ckpt_path=ckpt_path)
    return trainer


def stored(svi, path):
    return torch.load(save(svi, path), weights_only=True)[KEY]


# -- sizes and names -------------------------------------------------------------------------------


def latents_of_rows(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_sizes_and_plates_are_stored(tmp_path):
    svi = PyroSVIModule(latents_of_rows, data_plate="rows", steps_per_batch=2)
    data = ArrayDataModule(X, batch_size=4, val_split=0.2)
    fit(svi, data).save_checkpoint(tmp_path / "fit.ckpt")
    found = torch.load(tmp_path / "fit.ckpt", weights_only=True)[KEY]
    assert found["version"] == VERSION
    assert found["dataset_size"] == 24
    assert found["identities"] == N
    assert int(found["trained"].sum()) == 24
    assert found["steps_per_batch"] == 2
    assert (found["plates"], found["columns"]) == (["rows"], {})
    assert found["structure"]["sites"] == {"z": [-1]}


def test_the_size_of_other_plates_is_stored(tmp_path):
    case = CASES["columns"]
    svi = case.make()
    svi.loss(case.batch(0))
    found = stored(svi, tmp_path / "fit.ckpt")
    assert (found["plates"], found["columns"]) == (["users"], {"items": 6})


# -- data ------------------------------------------------------------------------------------------


def with_names(x, names):
    """The names are read, and nothing is made of them."""
    if len(names) != len(x):
        raise ValueError("a name for each row")
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x)


NAMES = [f"name-{number:02d}" for number in range(N)]


def rows_in(path):
    """Numbers of the rows of which a file holds the bytes of a value, or of a name."""
    held = path.read_bytes()
    values = [row for row in range(N) if X[row].numpy().tobytes() in held]
    return values, [row for row in range(N) if NAMES[row].encode() in held]


@pytest.mark.parametrize(("save_example", "expected"), [(True, [0, 1]), (False, [])])
def test_two_rows_of_the_data_are_in_the_file_or_none(save_example, expected, tmp_path):
    svi = PyroSVIModule(with_names, save_example=save_example)
    loader = DataLoader(list(zip(X, NAMES, strict=True)), batch_size=B)
    fit(svi, loader).save_checkpoint(tmp_path / "fit.ckpt")
    assert rows_in(tmp_path / "fit.ckpt") == (expected, expected)
    loaded = PyroSVIModule.load_from_checkpoint(tmp_path / "fit.ckpt", model=with_names)
    assert_equal_draws(loaded, svi)


def test_a_batch_that_is_a_view_does_not_bring_all_rows_along(tmp_path):
    svi = PyroSVIModule(normal_mean, dataset_size=N)
    svi.loss(X[:B])
    assert rows_in(save(svi, tmp_path / "fit.ckpt"))[0] == [0, 1]


class WholeBatch(PyroSVIModule):
    def num_rows(self, batch):
        return len(batch)


def test_the_whole_batch_is_in_the_file_where_its_rows_are_counted_by_the_user(tmp_path):
    svi = WholeBatch(normal_mean, dataset_size=N)
    svi.loss(X[:B])
    assert rows_in(save(svi, tmp_path / "fit.ckpt"))[0] == list(range(B))


def test_nothing_tells_one_data_set_from_another(tmp_path):
    """Row numbers belong to a data set, which is known by a hash of its values."""
    svi = PyroSVIModule(latents_of_rows, data_plate="rows")
    data = IndexedDataset(X)
    trainer = fit(svi, DataLoader(data, batch_size=B))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    held = (tmp_path / "fit.ckpt").read_bytes()
    assert svi._source == data.source
    assert not any(data.source.to_bytes(8, order) in held for order in ("little", "big"))
    assert str(data.source).encode() not in held


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_rebuilt_without_an_example_of_the_data(name, tmp_path):
    case = CASES[name]
    svi = case.make(save_example=False)
    svi.loss(case.batch(0))
    move(svi)
    loaded = load_into(case.make(), save(svi, tmp_path / "fit.ckpt"))
    assert_equal_draws(loaded, svi, batch=case.batch(1))
    assert torch.equal(*(seeded(lambda m=m: m.loss(case.batch(2))) for m in (loaded, svi)))


def weighted(x, counts):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, counts.sqrt()), obs=x)


def test_a_blank_example_need_not_be_possible_data(tmp_path):
    svi = PyroSVIModule(weighted, dataset_size=N, save_example=False)
    svi.loss((X[:B], torch.arange(1, B + 1)))
    loaded = PyroSVIModule.load_from_checkpoint(save(svi, tmp_path / "fit.ckpt"), model=weighted)
    assert_equal_draws(loaded, svi)


# -- batches that cannot be stored -----------------------------------------------------------------


@dataclass
class Graph:
    x: torch.Tensor


class OfGraphs(PyroSVIModule):
    def __init__(self, **options):
        super().__init__(guide=AutoMultivariateNormal, **options)

    def num_rows(self, batch):
        return len(batch.x)

    def model_inputs(self, batch):
        return (batch.x,), {}

    def model(self, x):
        normal_mean(x)


def graphs():
    return DataLoader(X, batch_size=B, collate_fn=lambda items: Graph(torch.stack(items)))


@pytest.fixture
def of_graphs(tmp_path):
    svi = OfGraphs()
    with pytest.warns(UserWarning, match="no example batch.*batch is a Graph.*save_example=False"):
        trainer = fit(svi, graphs())
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    return svi, tmp_path / "fit.ckpt"


def test_without_an_example_the_error_says_what_to_do(of_graphs):
    with pytest.raises(RuntimeError, match="(?s)guide.loc.*batch is a Graph.*svi.loss.batch."):
        OfGraphs.load_from_checkpoint(of_graphs[1])


def test_without_an_example_a_module_is_loaded_by_hand(of_graphs):
    svi, path = of_graphs
    loaded = OfGraphs()
    checkpoint = torch.load(path, weights_only=True)
    loaded.on_load_checkpoint(checkpoint)
    loaded.loss(Graph(X[:B]))
    loaded.load_state_dict(checkpoint["state_dict"])
    assert loaded.dataset_size == N
    assert_equal_draws(loaded, svi)


def test_without_an_example_a_trainer_with_a_loader_restores_a_fresh_module(of_graphs):
    svi, path = of_graphs
    fresh = OfGraphs()
    quiet_trainer().validate(fresh, graphs(), ckpt_path=path, verbose=False)
    assert fresh.dataset_size == N
    assert_equal_draws(fresh, svi)


def test_who_leaves_the_example_out_is_not_warned(tmp_path):
    fit(OfGraphs(save_example=False), graphs())


# -- versions --------------------------------------------------------------------------------------


@pytest.fixture
def fitted(tmp_path):
    """A fit of latents of rows, and its checkpoint as a dict."""
    svi = PyroSVIModule(latents_of_rows, data_plate="rows", steps_per_batch=2)
    data = ArrayDataModule(X, batch_size=5, val_split=0.2)
    fit(svi, data).save_checkpoint(tmp_path / "fit.ckpt")
    return svi, data, torch.load(tmp_path / "fit.ckpt", weights_only=True)


def fresh():
    return PyroSVIModule(latents_of_rows, data_plate="rows", steps_per_batch=2)


def test_a_newer_version_is_refused(fitted, tmp_path):
    _, data, checkpoint = fitted
    checkpoint[KEY] = {"version": VERSION + 1, "what": "is not known"}
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    newer = {"match": f"format {VERSION + 1} of pyro_lightning.*reads up to {VERSION}.*Upgrade"}
    with pytest.raises(ValueError, **newer):
        PyroSVIModule.load_from_checkpoint(
            tmp_path / "newer.ckpt", model=latents_of_rows, data_plate="rows"
        )
    with pytest.raises(ValueError, **newer):
        fit(fresh(), data, tmp_path / "newer.ckpt", max_epochs=2)


@pytest.mark.parametrize("stored", [3, {"versions": 1}, {"version": "2"}, {"version": 0}])
def test_what_is_no_version_is_refused(fitted, stored, tmp_path):
    checkpoint = {**fitted[2], KEY: stored}
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is not what pyro_lightning writes there"):
        PyroSVIModule.load_from_checkpoint(
            tmp_path / "other.ckpt", model=latents_of_rows, data_plate="rows"
        )


@pytest.fixture
def of_version_1(fitted, tmp_path):
    """The checkpoint as the first version wrote it, in two keys."""
    svi, data, checkpoint = fitted
    now = checkpoint.pop(KEY)
    rows = {name: now[name] for name in ("identities", "trained")}
    checkpoint["pyro_lightning_rows"] = rows
    checkpoint["pyro_lightning_steps_per_batch"] = now["steps_per_batch"]
    torch.save(checkpoint, tmp_path / "first.ckpt")
    return svi, data, tmp_path / "first.ckpt"


def test_a_fit_of_version_1_is_resumed(of_version_1):
    _, data, path = of_version_1
    svi = fresh()
    assert fit(svi, data, path, max_epochs=2).global_step == 10
    with pytest.raises(ValueError, match="steps_per_batch=2, and this module has 1"):
        fit(PyroSVIModule(latents_of_rows, data_plate="rows"), data, path, max_epochs=2)


def test_a_fresh_module_validates_from_version_1(of_version_1):
    svi, data, path = of_version_1
    other = fresh()
    quiet_trainer().validate(other, datamodule=data, ckpt_path=path, verbose=False)
    assert torch.equal(other._trained, svi._trained)
    assert_equal_draws(other, svi, rows=svi._trained.nonzero().flatten())


def test_version_1_holds_no_example(of_version_1):
    with pytest.raises(RuntimeError, match="(?s)would be lost.*earlier version of pyro_lightning"):
        PyroSVIModule.load_from_checkpoint(
            of_version_1[2], model=latents_of_rows, data_plate="rows"
        )


# -- packing ---------------------------------------------------------------------------------------

Point = namedtuple("Point", "x y")
BATCHES = {
    "tuple": (torch.arange(3), [1, 2.5, "s", None, True]),
    "dict": {"x": torch.ones(2), 3: {"y": (torch.zeros(1),)}},
    "named tuple": Point(torch.ones(2), "a"),
    "kinds": [torch.float16, torch.Size([2]), torch.device("cpu"), 2 + 1j, b"bytes"],
    "arrays": (np.arange(6.0).reshape(2, 3), np.float32(2.5)),
    "sparse": torch.eye(3).to_sparse(),
}


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.to_dense(), other.to_dense())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if type(one) in (tuple, list, Point):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_comes_back_from_a_file_as_it_was(name):
    file = BytesIO()
    torch.save(pack(BATCHES[name]), file)
    file.seek(0)
    found = unpack(torch.load(file, weights_only=True))
    assert type(found) is type(BATCHES[name])
    assert equal(found, BATCHES[name])


@pytest.mark.parametrize("wrong", [Graph(X), {"a": [X, {1, 2}]}, (lambda: 3,)])
def test_what_cannot_be_packed_is_named(wrong):
    with pytest.raises(TypeError, match=r"^batch(\['a'\]\[1\]|\[0\])? is a (Graph|set|function)$"):
        pack(wrong)


def test_a_named_tuple_of_a_class_that_is_not_there_has_its_fields():
    packed = {**pack(Point(1, 2)), "module": "not_imported_anywhere"}
    found = unpack(packed)
    assert (found.x, found.y, found._fields) == (1, 2, ("x", "y"))
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert (again, type(again).__name__) == (found, "Point")


@pytest.mark.parametrize("where", [("builtins", "exec"), ("pyro", "plate"), ("os", "system")])
def test_a_file_cannot_have_something_else_called_than_a_named_tuple(where):
    packed = {**pack(Point(1, 2)), "module": where[0], "name": where[1]}
    assert unpack(packed) == (1, 2)


def test_a_blank_batch_has_shapes_and_dtypes_alone():
    batch = {"x": torch.rand(2, 3).double(), "k": torch.tensor([7, 9]), "on": torch.tensor([False])}
    found = unpack(blank(pack({**batch, "name": ["a", "b"], "n": 3, "f": 0.3})))
    assert equal(found["x"], torch.ones(2, 3).double())
    assert equal(found["k"], torch.zeros(2, dtype=torch.long))
    assert equal(found["on"], torch.tensor([True]))
    assert (found["name"], found["n"], found["f"]) == (["", ""], 1, 1.0)
