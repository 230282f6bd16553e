"""A job of two processes ends with the error of the one that fails; the other does not wait."""

import re
import signal

from support import run_processes

# The other process meets a closed connection, or Lightning ends it: it looks every five seconds
# whether a process that it started has failed. Waiting for it would take torch's half an hour.
SECONDS = 150


def test_a_job_that_lightning_started_ends_with_the_error_of_its_first_process(tmp_path):
    # The pipe of its errors is open until the process that Lightning started has ended, too.
    (ended,) = run_processes("ddp_failing_fit.py", tmp_path, "0", "loader", timeout=SECONDS)
    assert ended.code != 0
    assert "LookupError: the fourth step" in ended.errors


def test_a_job_of_two_nodes_ends_on_both_with_the_error_of_one(tmp_path):
    first, second = run_processes(
        "ddp_failing_fit.py", tmp_path, "1", "model", nodes=2, timeout=SECONDS
    )
    assert first.code != 0
    assert second.code != 0
    assert "LookupError: the fourth step" in second.errors
    assert "LookupError" not in first.errors


def test_a_process_that_is_killed_ends_the_other(tmp_path):
    first, second = run_processes(
        "ddp_failing_fit.py", tmp_path, "1", "killed", nodes=2, timeout=SECONDS
    )
    assert second.code == -signal.SIGKILL
    assert first.code != 0
    # Whether it waited for the other, or was about to send to it.
    assert re.search("Connection|Socket closed|Broken pipe", first.errors)
