"""The cache of compiled programs: a second start of a command finds all of its programs there."""

import json
import os
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from clvr_jax.compilation import release_programs, without_compilation_cache
from tests.commands.command_line import PROMPT

COUNTING = """
import json, sys
from collections import Counter

import jax

counts = Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
from clvr_jax.cli import main

code = main(sys.argv[1:])
print(json.dumps(counts), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_second_start_of_a_command_compiles_nothing(tmp_path):
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    del environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]  # as a user starts it

    def start(name):
        command = ["generate", PROMPT, "--model", "shapes-tiny", "--max-steps", "1", "--nfe", "1"]
        command += ["--verification", "none", "--out", str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, *command], env=environment, capture_output=True, text=True, check=True
        )
        counts = json.loads(done.stderr.splitlines()[-1])
        return counts["compile_requests_use_cache"], counts.get("cache_hits", 0)

    requests, hits = start("first")
    assert requests > 5
    assert hits < requests
    assert start("second") == (requests, requests)


@pytest.fixture
def programs(tmp_path):
    """An empty cache of compiled programs for one test."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    reset_cache()


def test_programs_can_bypass_a_cache_that_is_in_use(programs):
    def compile_for(offset):
        jax.jit(lambda x: x * 3 + offset)(1.0)
        return len(list(programs.glob("*lambda*-cache")))

    written = compile_for(1)
    assert written
    with without_compilation_cache():
        assert compile_for(2) == written
    assert compile_for(3) > written


def test_programs_are_dropped_before_the_maps_of_a_process_run_out(tmp_path, monkeypatch):
    dropped = []
    monkeypatch.setattr("jax.clear_caches", lambda: dropped.append(True))
    maps, limit = tmp_path / "maps", tmp_path / "max_map_count"
    limit.write_text("100\n")
    maps.write_text("7f00-7f01 r--p\n" * 69)
    assert not release_programs(maps=maps, limit=limit)
    maps.write_text("7f00-7f01 r--p\n" * 70)
    assert release_programs(maps=maps, limit=limit)
    assert not release_programs(maps=maps, limit=limit, interval_seconds=1000.0), "they were counted a moment ago"
    assert len(dropped) == 1
    assert not release_programs(maps=tmp_path / "none", limit=limit), "other systems have no such file"
