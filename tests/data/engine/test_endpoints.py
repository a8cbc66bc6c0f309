"""Tests of the engine with a real HTTP server, with and without faults of the server."""

import dataclasses
import json

import pytest

from clvr_jax import cli
from clvr_jax.configs import prompted_synth
from clvr_jax.data.engine.engine import synthesize
from clvr_jax.data.engine.metering import UsageTracker
from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.data.trajectories.dataset import TrajectoryDataset
from clvr_jax.interfaces import ProviderError
from clvr_jax.providers.endpoint import Prices
from tests.data.engine.cooperative_server import LIGHT, answer
from tests.providers.server import Reply, completion, failure, picture, pictures, png

ITEM = PromptItem("one", "a light color")


@pytest.fixture
def made(server, endpoint):
    """Returns a function: (replies, options of the recipe) -> the outcome of one prompt, and its usage."""

    def make(script, options=(), **fields):
        server.script = script
        connection = endpoint(**fields)
        config = dataclasses.replace(
            prompted_synth.CONFIG,
            **dict.fromkeys(("director", "verifier", "second_judge", "images"), connection),
            **{"image_size": (8, 8), **dict(options)},
        )
        worker_context, tracker = prompted_synth.worker_context(config), UsageTracker()
        outcome = synthesize(ITEM, worker_context.roles(ITEM, tracker), tracker.image_model(worker_context.image_model))
        return outcome, tracker

    return make


def test_a_cooperative_server_gives_a_trajectory_and_all_calls_are_in_the_usage(made, server):
    outcome, tracker = made([answer], prices=Prices(input_tokens=1.0, output_tokens=2.0, picture=0.03))
    assert outcome.stage == "kept", outcome.detail
    record = outcome.record
    assert [step.reasoning.partition(".")[0] for step in record.trajectory.steps] == [
        "Plan: a color; light",
        "I see it dark",
        "I see it light",
    ]
    assert record.proxies[1].p_i2i == "make it light"
    assert tracker.usage["draw"].pictures == 3  # and the baseline
    assert tracker.usage["first judge"].calls == tracker.usage["second judge"].calls == 2
    assert tracker.total.calls == len(server.seen)
    calls = tracker.total.calls - 3
    assert tracker.total.dollars == pytest.approx(3 * 0.03 + calls * (11 * 1.0 + 7 * 2.0) / 1e6)


@pytest.mark.parametrize(
    ("reply", "reason", "message"),
    [
        (completion("I would rather not."), "invalid action", "no JSON object"),
        (completion(None, refusal="I cannot help with that."), "refused", "cannot help"),
        (completion('{"perceive": "x", "reason": "y", "action": "DANCE"}'), "invalid action", "DANCE"),
    ],
)
def test_unusable_replies_of_the_planner_discard_the_prompt_with_a_reason(made, reply, reason, message):
    outcome, _ = made([reply])
    assert (outcome.record, outcome.stage, outcome.reason) == (None, None, reason)
    assert message in outcome.detail


@pytest.mark.parametrize(
    ("reply", "fault", "message"),
    [
        (failure(500), "down", "500"),
        (failure(429, "slow down"), "limited", "429"),
        (failure(401, "no such key"), "rejected", "no such key"),
        (Reply(b""), "down", "empty"),
        (completion('{"perceive": "x"', finish="length"), "down", "truncated at max_tokens"),
    ],
)
def test_no_reply_of_the_planner_gives_no_outcome(made, reply, fault, message):
    with pytest.raises(ProviderError, match=message) as caught:
        made([reply])
    assert caught.value.fault == fault


@pytest.mark.parametrize(
    ("reply", "message"),
    [(pictures(png(picture(16, 8))), "requested an image of 8 x 8"), (pictures(b"nothing"), "not an image")],
)
def test_a_failing_image_generator_gives_no_outcome(made, reply, message):
    with pytest.raises(ProviderError, match=message):
        made([lambda seen: reply if "/images/" in seen.path else answer(seen)])


@pytest.mark.parametrize("references", ["edits", "generations"])
def test_a_server_that_returns_paths_of_its_disk_is_requested_to_return_images(made, server, references):
    """Xinference and SGLang do so unless `response_format` says otherwise, for new images and for edits."""

    def of_the_disk(seen):
        if "/images/" not in seen.path:
            return answer(seen)
        if b"b64_json" not in seen.body:
            return pictures("/root/.xinference/image/1.png")
        return pictures(png(LIGHT)) if seen.path.endswith("/edits") else answer(seen)

    with pytest.raises(ProviderError, match="response format to b64_json"):
        made([of_the_disk], {"image_references": references})
    server.seen.clear()
    outcome, _ = made([of_the_disk], {"image_references": references, "image_format": "b64_json"})
    assert outcome.stage == "kept", outcome.detail
    asked = {seen.path.rpartition("/")[2] for seen in server.seen if "/images/" in seen.path}
    assert asked == {"generations", references}


def test_a_refusal_of_the_image_generator_discards_the_prompt_with_a_reason(made):
    reply = failure(400, "rejected by our safety system", code="content_policy_violation")
    outcome, _ = made([lambda seen: reply if "/images/" in seen.path else answer(seen)])
    assert (outcome.record, outcome.reason) == (None, "refused")
    assert "safety system" in outcome.detail


def test_an_unreadable_reply_is_requested_again(made):
    replaced = []

    def now_and_then(seen):
        text = "" if "/images/" in seen.path else seen.json["messages"][0]["content"][-1]
        kind = text["text"][:40] if isinstance(text, dict) else str(text)[:40]
        if kind and kind not in replaced and "Your last answer" not in json.dumps(seen.json):
            replaced.append(kind)
            return completion("Certainly! Here is what I think.")
        return answer(seen)

    outcome, _ = made([now_and_then])
    assert outcome.stage == "kept", outcome.detail
    assert len(replaced) >= 6  # each role had an unreadable reply


@pytest.mark.slow
def test_sixty_four_prompts_keep_fifty_requests_in_flight(tmp_path, server, endpoint, capsys):
    server.script = [answer]
    server.hold_until(50)  # no reply before fifty requests are pending
    prompts = tmp_path / "prompts.jsonl"
    texts = [
        *(f"a light color, number {number}" for number in range(64)),
        "",
        "A light  color, number 3!",
        "x" * 50_000,
    ]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = [
        "--prompts",
        str(prompts),
        "--image-size",
        "8",
        "8",
        "--out",
        str(tmp_path / "run"),
        "--synth.in-flight",
        "64",
    ]
    for role in ("director", "verifier", "second-judge", "images"):
        options += [f"--{role}.model", "tiny", f"--{role}.base-url", server.url + "/v1"]
        options += [f"--{role}.key-variable", "LOOPBACK_KEY", f"--{role}.max-in-flight", "64"]
    assert cli.main(["synth", "configs/prompted_synth.py", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert server.peak >= 50
    assert found["refused"] == {"empty": 1, "duplicate": 1, "too long": 1}
    assert found["stages"]["kept"]["prompts"] == 64
    assert len(TrajectoryDataset(tmp_path / "run" / "dataset")) == 64
    assert found["total"]["calls"] == len(server.seen)


def test_missing_keys_are_reported_before_any_call(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ARK_API_KEY", "something")
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    (tmp_path / "p.txt").write_text("a cat\n")
    options = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run")]
    assert cli.main(["synth", "configs/prompted_synth.py", *options]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "GEMINI_API_KEY" in message
    assert not (tmp_path / "run" / "dataset").exists()
