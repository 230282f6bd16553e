"""The quick start of the README, as a reader would run it."""

import re
from pathlib import Path

import pytest
import torch


# Lightning's advice to install a logger, which a reader sees once.
@pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed as a dependency")
def test_the_quick_start_finds_the_coefficients(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer of the quick start logs and writes checkpoints
    text = (Path(__file__).parents[1] / "README.md").read_text()
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    torch.manual_seed(0)
    names = {}
    exec(compile(source, "README.md", "exec"), names)
    draws = names["svi"].posterior_samples(1000)["w"]
    # Posterior sd is 0.3 / sqrt(10,000) = 0.003; noise of the steps at a fixed rate is of its size.
    error = (draws.mean(0) - torch.tensor([1.0, -2.0, 0.5])).abs().max()
    assert draws.shape == (1000, 3) and error < 0.05
