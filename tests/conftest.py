"""What holds for all tests, and what some of them ask for."""

import pyro
import pytest
import torch
from support import run_script

# The models are tiny, and threads that wait for each other cost most of their time.
torch.set_num_threads(1)


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
