"""No lie of an endpoint loses a prompt, invents a score or an image, runs without end, or fills the memory.

`make test` tries every sixth kind, `make test-robustness` all of them, in a process of their own whose memory is
measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.providers.server import LoopbackServer
from tests.robustness.conftest import SECONDS, SECONDS_ON_A_BUSY_MACHINE
from tests.robustness.lies import kinds, tried

ALL = bool(os.environ.get("ALL_INPUTS"))
MOST_ADDED_MIB = 200
"""Twice the largest response, 64 MiB, since text is made of bytes and JSON of text; 32 MiB of all others; decoders."""
PEAK_MIB = 500 * 10**6 >> 20
"""Limit of the whole process, with its modules and the server."""
SOME = [] if ALL else [pytest.param(*each, id=f"{each[0]}, {each[1]}") for each in list(kinds())[::6]]


def test_there_are_enough_kinds():
    assert len(list(kinds())) >= 60


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "lie"), SOME)
def test_nothing_is_lost_or_invented(kind, name, lie, tmp_path):
    server = LoopbackServer()
    try:
        assert tried(server, kind, name, lie, tmp_path) == (0, 0)
    finally:
        server.close()


@pytest.mark.skipif(not ALL, reason="make test-robustness")
def test_all_kinds_in_bounded_time_and_memory():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.lies"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kinds"] >= 60
    assert (found["prompts_lost"], found["invented"]) == (0, 0)
    assert found["longest_processor_seconds"] < SECONDS
    assert found["longest_seconds"] < SECONDS_ON_A_BUSY_MACHINE
    assert found["most_added_by_a_kind_mib"] < MOST_ADDED_MIB
    assert found["peak_memory_mib"] < PEAK_MIB
