"""The cache of compiled programs: a second start of a command finds all of its programs there."""

import json
import os
import subprocess
import sys
from collections import Counter

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
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, fun_name=None, **_: counts.update([f"trace {fun_name}"] if "trace" in event else [])
)
from clvr_jax.cli import main

code = main(sys.argv[1:])
print(json.dumps(counts), file=sys.stderr)
sys.exit(code)
"""

TRACED = ("trace encode_text", "trace denoise", "trace _decode_tokens", "trace _generate", "trace make_noise")


def start(directory, name, **variables):
    """Runs a command as a user does; returns counts of events, and the image."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(directory / "programs"), **variables}
    del environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]  # as a user starts it
    command = ["generate", PROMPT, "--model", "shapes-tiny", "--max-steps", "1", "--nfe", "1"]
    command += ["--verification", "none", "--out", str(directory / name)]
    done = subprocess.run(
        [sys.executable, "-c", COUNTING, *command], env=environment, capture_output=True, text=True, check=True
    )
    image = (directory / name / "step_00.png").read_bytes()
    return Counter(json.loads(done.stderr.splitlines()[-1])), image, done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What all starts share: the cache of compiled programs, and a store of programs for those that use one."""
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def without_store(directory):
    """Two starts without a store of programs, of which the first finds an empty cache."""
    return [start(directory, name) for name in ("first", "second")]


@pytest.mark.slow
def test_a_second_start_of_a_command_compiles_nothing(without_store):
    (first, image, _), (second, same, _) = without_store
    requests = first["compile_requests_use_cache"]
    assert requests > 5
    assert first["cache_hits"] < requests
    assert second["compile_requests_use_cache"] == second["cache_hits"] == requests
    assert same == image


@pytest.mark.slow
def test_a_second_start_traces_none_of_the_large_functions(directory, without_store):
    store = directory / "store"
    first, image, _ = start(directory, "stored", CLVR_PROGRAMS=str(store))
    assert all(first[name] for name in TRACED)
    assert image == without_store[0][1], "the program is the one that is compiled without a store"
    second, same, _ = start(directory, "found", CLVR_PROGRAMS=str(store))
    assert not any(second[name] for name in TRACED)
    assert same == image, "the program is the same"
    # All keys and the small programs: every function is traced again, and the two large ones are not compiled again.
    for path in sorted(store.iterdir(), key=lambda path: path.stat().st_size)[:-2]:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    third, same, errors = start(directory, "damaged", CLVR_PROGRAMS=str(store))
    assert all(third[name] for name in TRACED)
    assert same == image
    assert "damaged" in errors
    assert not any(start(directory, "mended", CLVR_PROGRAMS=str(store))[0][name] for name in TRACED)


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
