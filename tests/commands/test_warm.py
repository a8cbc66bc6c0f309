"""`clvr warm`: later commands find its programs, and invalid options are one line."""

import json
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.warming import text_of, warm_calls
from clvr_jax.programs import enable_program_store
from clvr_jax.programs.function import drop_programs
from tests.commands.command_line import PROMPT, complaint

FUNCTIONS = ("encode_text", "denoise", "_decode_tokens", "_encode_tokens", "make_noise")


@pytest.fixture
def traced(monkeypatch, tmp_path):
    """Names of the functions that were traced, with programs stored in a directory of the test."""
    monkeypatch.setenv("CLVR_PROGRAMS", str(tmp_path / "store"))
    found = Counter()

    def listen(event, seconds, fun_name=None, **_):
        found.update([fun_name] if event.endswith("jaxpr_trace_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)
    monkeypatch.setenv("CLVR_PROGRAMS", "off")
    enable_program_store()


def run(capsys, *words):
    drop_programs()  # as another process, which has none in memory
    assert main(["warm", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(), ("--mesh.tensor", "2", "--mesh.fsdp", "2", "--mesh.devices", "4")], ids=str)
def test_a_command_finds_the_programs_that_were_made_ahead(small_flux2, traced, tmp_path, capsys, mesh):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), np.uint8)).save(photo)
    made = run(
        capsys, small_flux2, "--sizes", "32x64", "--references", "1", "--text-tokens", "28", "--steps", "2", *mesh
    )
    assert Counter(each["name"] for each in made["programs"]) == dict.fromkeys([*FUNCTIONS, "_row_keys"], 1)
    assert (made["made"], made["existed"], made["not_stored"]) == (6, 0, 0)
    assert 0 < made["bytes"] < made["directory_bytes"]
    assert all(traced[name] == 1 for name in FUNCTIONS)
    traced.clear()
    again = run(
        capsys, small_flux2, "--sizes", "32x64", "--references", "1", "--text-tokens", "28", "--steps", "2", *mesh
    )
    assert (again["made"], again["existed"]) == (0, 6)
    drop_programs()
    sample = ["sample", PROMPT, "--model", str(small_flux2), "--image", str(photo), "--steps", "2", *mesh]
    assert main([*sample, "--out", str(tmp_path / "with.png")]) == 0
    assert not any(traced[name] for name in FUNCTIONS)
    jax.clear_caches()  # of the other tests in this process
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CLVR_PROGRAMS", "off")
        assert main([*sample, "--out", str(tmp_path / "without.png")]) == 0
    assert all(traced[name] for name in FUNCTIONS)
    assert (tmp_path / "with.png").read_bytes() == (tmp_path / "without.png").read_bytes()


def test_lengths_of_texts_stand_for_their_buckets(small_flux2):
    pipe = Flux2Pipeline.from_pretrained(str(small_flux2))
    buckets = pipe.settings.text_buckets
    calls = warm_calls(pipe, [], range(2), (1, buckets[0], buckets[0] + 1))
    size = (pipe.settings.sample_size,) * 2
    assert calls == [(size, number, text) for number in range(2) for text in buckets[:2]]
    everything = warm_calls(pipe, [(32, 64), (64, 32)], range(1))
    assert [call.text_tokens for call in everything] == [*buckets, *buckets]
    for bucket in buckets:
        assert pipe._lengths([text_of(pipe, bucket)]) == [bucket]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "64y64"], "--sizes 64y64"),
        (["--sizes", "65"], "65"),
        (["--references", "3-1"], "--references 3-1"),
        (["--references", "0-1000"], "--references 0-1000"),
        (["--references", "-1"], "--references"),
        (["--text-tokens", "0"], "--text-tokens"),
        (["--text-tokens", "100000"], "at most"),
        (["--steps", "0"], "--steps"),
        (["--prompts", "none.txt"], "none.txt"),
    ],
)
def test_invalid_options_are_one_line(small_flux2, traced, words, message, capsys):
    assert main(["warm", str(small_flux2), *words]) in (1, 2)
    assert message in complaint(capsys)


def test_nothing_is_made_without_a_directory(small_flux2, monkeypatch, tmp_path, capsys):
    assert main(["warm", str(small_flux2)]) == 2
    assert "CLVR_PROGRAMS is off" in complaint(capsys)
    monkeypatch.setenv("CLVR_PROGRAMS_GIB", "many")
    assert main(["warm", str(small_flux2)]) == 2
    assert "CLVR_PROGRAMS_GIB" in complaint(capsys)


def test_a_model_without_a_controller_runs_in_no_loop(small_flux2, traced, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(PROMPT + "\n")
    assert main(["warm", str(small_flux2), "--prompts", str(tmp_path / "prompts.txt")]) in (1, 2)
    assert "controller" in complaint(capsys)
