"""Tests that faults of providers and of the disk lose no prompt: failed prompts are not stored as finished."""

import dataclasses
import json
import threading

import pytest

from clvr_jax.configs import prompted_synth
from clvr_jax.data.engine.beam_pipeline import _Synthesize
from clvr_jax.data.engine.intake import item_to_json
from clvr_jax.data.engine.metering import StoppedError, UsageTracker
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import SynthConfig, load_synth_recipe
from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.data.engine.run import _forget_failures, open_run
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import write_json
from tests.data.engine.cooperative_server import answer
from tests.providers.server import Reply, completion, failure, picture, pictures, png

ITEMS = [PromptItem(f"p-{number:02d}", f"a light color, number {number}") for number in range(40)]
IDS = {item.id for item in ITEMS}


@pytest.fixture
def synth(tmp_path, endpoint):
    """Returns a function: (items, fields of SynthConfig) -> the store after the engine has processed a bundle."""
    connection = endpoint(max_retries=0)
    config = dataclasses.replace(
        prompted_synth.CONFIG,
        **dict.fromkeys(("director", "verifier", "second_judge", "images"), connection),
        image_size=(8, 8),
    )

    def run(items, **fields):
        store = tmp_path / "outcomes"
        function = _Synthesize(lambda: prompted_synth.worker_context(config), str(store), SynthConfig(**fields))
        function.setup()
        try:
            for item in items:
                function.process(item_to_json(item))
            function.finish_bundle()
        finally:
            function.teardown()
        return OutcomeStore(store)

    return run


def on(path, reply):
    """Returns a server with a given reply at one path and valid replies elsewhere."""
    return lambda seen: reply if path in seen.path else answer(seen)


EMPTY = completion(None)
INVALID_CHAT_REPLIES = [
    *(failure(status) for status in (400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503, 504, 529)),
    failure(429, code="insufficient_quota"),
    failure(403, type="billing_not_active"),
    Reply(status=302, headers={"Location": "http://localhost:1/login"}),
    *(Reply(body) for body in (b"", b"<html>log in</html>", b"null", b"[]", b"7", b"{", b"data: [DONE]")),
    *(Reply(body) for body in ({}, {"choices": []}, {"choices": [None]}, {"choices": None}, {"error": {"code": 503}})),
    EMPTY,
    completion(""),
    completion("<think>it is"),
    completion('{"perceive": "x", "rea', finish="length"),
    completion("Service unavailable, please log in."),
    completion('{"error": "busy"}'),
    Reply(b"\x00\xff\xfe"),
    Reply(b"{}", headers={"Content-Encoding": "br"}),
]
INVALID_IMAGE_REPLIES = [
    *(failure(status) for status in (401, 429, 503)),
    *(Reply(body) for body in (b"", b"<html>log in</html>", {"data": []}, {"data": [{"b64_json": "?"}]})),
    pictures(b"no image"),
    pictures(png(picture(16, 8))),
    pictures("/tmp/1.png"),
    pictures("http://localhost:1/1.png"),
]


def test_no_invalid_reply_of_a_server_finishes_a_prompt(server, synth):
    replies = [*INVALID_CHAT_REPLIES, *(on("/images/", reply) for reply in INVALID_IMAGE_REPLIES)]
    for reply in replies:
        server.script = [reply]
        assert synth(ITEMS[:2], in_flight=2).ids() == set()
    store = synth([])
    assert store.failed("p-00").detail
    server.script = [answer]
    store = synth(ITEMS[:2], in_flight=2)
    assert {store.read(id).stage for id in store.ids()} == {"kept"}
    assert len(store.ids()) == 2
    assert store.read("p-00").usage["director"]["calls"] > len(INVALID_CHAT_REPLIES)  # failed calls are in the usage


def test_a_refusal_is_an_outcome_and_is_not_repeated(server, synth):
    server.script = [completion(None, refusal="I cannot help with that.")]
    store = synth(ITEMS[:1])
    assert store.read("p-00").reason == "refused"
    num_requests = len(server.seen)
    synth(ITEMS[:1])
    assert len(server.seen) == num_requests


def test_a_run_in_which_all_prompts_fail_stops_early_with_a_reason(server, synth):
    server.script = [failure(503, "overloaded")]
    # A sixth may have failed before the run stops, since two are in flight.
    with pytest.raises(ClvrError, match=r"[56] prompts failed .* no prompt is lost, run it .* HTTP 503: overloaded"):
        synth(ITEMS, in_flight=2, max_failures=5)
    assert len(server.seen) <= 5 + 2


def test_unreadable_replies_finish_a_prompt_if_replies_to_others_are_readable(server, synth):
    def moody(seen):
        return completion("Certainly!") if "number 1" in seen.body.decode() else answer(seen)

    server.script = [moody]
    assert synth(ITEMS[1:2]).ids() == set()
    store = synth(ITEMS[:3], in_flight=1)
    assert store.ids() == {"p-00", "p-01", "p-02"}
    assert (store.read("p-01").reason, store.read("p-02").stage) == ("invalid action", "kept")


def test_a_full_disk_ends_the_run_without_further_calls(server, synth, monkeypatch):
    def full(self, outcome, *rest):
        raise ClvrError(f"{outcome.item.id}: cannot be written (No space left on device)")

    server.script = [answer]
    synth(ITEMS[:1])
    for_one = len(server.seen)
    monkeypatch.setattr(OutcomeStore, "write", full)
    with pytest.raises(ClvrError, match="No space left on device"):
        synth(ITEMS[1:], in_flight=2)
    assert len(server.seen) <= 4 * for_one  # not 39 prompts


def test_a_stopped_run_makes_no_calls():
    stop = threading.Event()
    tracker = UsageTracker(stop=stop)
    tracker.begin()
    stop.set()
    with pytest.raises(StoppedError):
        tracker.begin()


def test_refused_fields_of_requests_are_in_the_outcome(server, synth):
    refusal = failure(400, "Unknown parameter: 'seed'.", param="seed")
    server.script = [lambda seen: refusal if b'"seed"' in seen.body else answer(seen)]
    store = synth(ITEMS[:1])
    (notes,) = store.read("p-00").content["adapted"].values()
    assert notes == ["seed left out; replies may differ from run to run"]


# --- synth.json -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(monkeypatch):
    from pathlib import Path

    return load_synth_recipe(Path(prompted_synth.__file__))


def director(recipe, **fields):
    return dataclasses.replace(recipe.config, director=dataclasses.replace(recipe.config.director, **fields))


def begun(recipe, config, out):
    """Makes a run with one outcome."""
    from clvr_jax.data.engine.recipes import identity

    write_json(out / "synth.json", identity(recipe, config))
    store = open_run(recipe, config, out)
    store.path("p-00").parent.mkdir(parents=True)
    store.path("p-00").write_bytes(b"")


def test_options_may_be_changed_until_there_is_an_outcome(recipe, tmp_path):
    open_run(recipe, recipe.config, tmp_path)
    assert not (tmp_path / "synth.json").exists()
    write_json(tmp_path / "synth.json", {"recipe": "prompted_synth", "config": {}})
    open_run(recipe, director(recipe, model="other"), tmp_path)
    begun(recipe, recipe.config, tmp_path)
    with pytest.raises(UsageError, match=r"another director\.model"):
        open_run(recipe, director(recipe, model="other"), tmp_path)


def test_options_of_endpoint_calls_may_be_changed_at_any_time(recipe, tmp_path):
    begun(recipe, recipe.config, tmp_path)
    open_run(recipe, director(recipe, key_variable="OTHER_KEY", max_wait=600.0, max_retries=9), tmp_path)


def test_a_run_of_an_earlier_version_is_resumed(recipe, tmp_path):
    begun(recipe, recipe.config, tmp_path)
    old = json.loads((tmp_path / "synth.json").read_text())
    del old["config"]["image_format"]
    old["config"]["director"] |= {"key_variable": "K", "timeout": 1.0, "prices": {"picture": 0.5}}
    write_json(tmp_path / "synth.json", old)
    open_run(recipe, recipe.config, tmp_path)


def test_no_password_is_written(recipe, tmp_path):
    config = director(recipe, base_url="http://me:secret@localhost:8000/v1?key=secret")
    begun(recipe, config, tmp_path)
    assert "secret" not in (tmp_path / "synth.json").read_text()
    assert "localhost:8000" in (tmp_path / "synth.json").read_text()
    open_run(recipe, config, tmp_path)


def test_failures_that_an_earlier_version_stored_as_outcomes_are_processed_again(server, synth, monkeypatch):
    server.script = [completion(None, refusal="No.")]
    store = synth(ITEMS[:2])
    read = store.read
    monkeypatch.setattr(
        store, "read", lambda id: dataclasses.replace(read(id), reason="provider" if id == "p-00" else "refused")
    )
    _forget_failures(store, IDS)
    assert store.ids() == {"p-01"}
