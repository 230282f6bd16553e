"""The examples in full: each ends with a number that is checked against an outside one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
# Streaming takes four minutes; the fits of test_stream_fits.py are of fewer rows.
IN_FULL = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"streaming"})


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FULL)
def test_an_example_agrees_with_what_it_is_checked_against(tmp_path, name):
    ended = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--output", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (verdict,) = (line for line in ended.stdout.splitlines() if line.startswith("Verdict: "))
    # Within which bounds stands in the script, beside the reference that it computes.
    assert verdict.removeprefix("Verdict: ") in (
        "they agree.",
        "plate and loader agree.",
        "at least as good.",
    ), ended.stdout[-4000:]
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_read_at_one_sitting(path):
    assert len(path.read_text().splitlines()) < 150
