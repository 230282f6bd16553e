"""What holds for all tests, and what some of them ask for."""

import os

import pyro
import pytest
import torch
from support import run_script

# The models are tiny, and threads that wait for each other cost most of their time.
torch.set_num_threads(1)
# Else torch takes a seed of the system's noise. This one is of what modules draw on import.
SEED = 0
pyro.set_rng_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same noise in each run, whatever ran before, for fixtures of modules, too."""
    pyro.set_rng_seed(SEED)


@pytest.fixture(autouse=True)
def own_environment():
    """Variables for each test: Lightning leaves a seed there, and whether workers take it."""
    pyro.set_rng_seed(SEED)  # whether or not this test made the fixtures of its module
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_store():
    """A store of Pyro's for each test: what runs without the library leaves parameters there."""
    with pyro.get_param_store().scope():
        yield


@pytest.fixture
def untouched_store():
    """Pyro's global store, which is empty and must stay so."""
    with pyro.get_param_store().scope():
        yield
        assert not pyro.get_param_store()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A folder with one data set as shards of litdata and of WebDataset."""
    folder = tmp_path_factory.mktemp("shards")
    run_script("write_streams.py", folder)
    return folder
