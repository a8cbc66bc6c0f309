"""Systems behind a real HTTP server on loopback."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from clvr_jax.errors import UsageError
from clvr_jax.evaluation import ImageChecker, Score
from clvr_jax.evaluation.benchmarks.imaginebench import ImagineBench
from clvr_jax.evaluation.harness.images import generate_images, load_generated
from clvr_jax.evaluation.judging.questions import JudgeModel
from clvr_jax.evaluation.reporting.run import notes
from clvr_jax.evaluation.systems.endpoints import endpoint_system
from clvr_jax.interfaces import ProviderError
from clvr_jax.providers.endpoint import Prices
from clvr_jax.providers.loop_roles import REWRITE_PROMPT
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.providers.openai_images import OpenAIImageModel
from clvr_jax.reasoning import SYSTEM_PROMPT, Budget
from tests.evaluation.benchmarks.samples import IMAGINE, write_lines
from tests.evaluation.judging.test_judging import GOOD
from tests.evaluation.runs import run_function, score_judged
from tests.providers.server import completion, failure, pictures, png

METADATA = [{"tag": "colors", "include": [], "prompt": f"p {number}"} for number in range(6)]


def flat(value):
    return np.full((8, 8, 3), value, np.uint8)


def judge():
    return ImageChecker("brightness", "1", lambda image, metadata: Score.binary(bool(image.mean() > 100)))


def go(system, out):
    return run_function(
        METADATA,
        system.generate,
        out,
        judge(),
        settings=system.settings,
        device=system.device,
        batch_size=system.batch_size,
    )


def test_one_shot_with_a_refusal_and_what_it_costs(server, endpoint, tmp_path):
    def answer(seen):
        return failure(400, "no", code="content_policy_violation") if "p 3" in seen.json["prompt"] else bright

    bright = pictures(png(flat(255)), usage={"input_tokens": 9, "output_tokens": 100})
    server.script = [answer]
    system = endpoint_system(OpenAIImageModel(endpoint(prices=Prices(picture=0.04))), in_flight=3)
    results = go(system, tmp_path)
    assert [entry["correct"] for entry in results["pictures"]] == [True, True, True, False, True, True]
    refused, drawn = results["pictures"][3], results["pictures"][4]
    assert (refused["outcome"], refused["reasons"]) == ("refused", ["no image was generated (refused)"])
    assert (drawn["dollars"], drawn["output_tokens"], drawn["nfe"]) == (0.04, 100, None)
    assert drawn["seconds"] > 0
    assert results["summary"]["cost"]["dollars"] == pytest.approx(0.2)
    assert results["settings"]["model"] == system.device == f"tiny ({server.url.removeprefix('http://')})"
    assert server.peak <= 3


def test_a_failing_server_ends_the_run_and_nothing_is_paid_twice(server, endpoint, tmp_path):
    def answer(seen):
        return failure(401, "no key") if fails and seen.json["prompt"] == "p 4" else pictures(png(flat(255)))

    fails = True
    server.script = [answer]
    system = endpoint_system(OpenAIImageModel(endpoint()), in_flight=1)
    with pytest.raises(ProviderError, match="no key"):
        go(system, tmp_path)
    fails = False
    before = len(server.seen)
    assert all(entry["correct"] for entry in go(system, tmp_path)["pictures"])
    assert [seen.json["prompt"] for seen in server.seen[before:]] == ["p 4", "p 5"]


class Both:
    """Chat and pictures behind one address; of what is drawn every third is found good."""

    def __init__(self):
        self.systems = []
        self.looks = 0

    def __call__(self, seen):
        if "images" in seen.path:
            return pictures(png(flat(0)))
        messages = seen.json["messages"]
        self.systems.append(messages[0]["content"])
        if len(messages) == 2:
            return completion("Plan: light. Draw light." if self.systems[-1] == REWRITE_PROMPT else "Go.<|image_gen|>")
        self.looks += 1
        if self.looks % 3:
            return completion("Dark. Unmet: light. More.<|image_gen|>")
        return completion("I see it. Unmet: nothing.<|terminate|>")


def test_planned_modes_ask_a_prompted_controller(server, endpoint, tmp_path):
    server.script = [both := Both()]
    tool = OpenAIImageModel(endpoint(prices=Prices(picture=0.01)))
    vlm = OpenAIChatModel(endpoint(prices=Prices(input_tokens=1e4)))
    with pytest.raises(UsageError, match="controller"):
        endpoint_system(tool, "closed-loop")
    loop = endpoint_system(tool, "closed-loop", Budget(max_steps=5), vlm, in_flight=1)
    (first,) = loop.generate(["p"], [1])
    assert (len(first.trajectory.generated), first.trajectory.outcome) == (3, "accepted")
    assert set(both.systems) == {SYSTEM_PROMPT}
    # Three pictures, and a plan and three looks of 11 tokens read and 7 written each.
    assert (first.usage.pictures, first.usage.input_tokens, first.usage.output_tokens) == (3, 44, 28)
    assert first.usage.dollars == pytest.approx(3 * 0.01 + 44 * 0.01)

    both.systems.clear()
    (once,) = endpoint_system(tool, "open-loop", None, vlm).generate(["p"], [1])
    assert (once.usage.calls, both.systems) == (2, [REWRITE_PROMPT])
    assert server.seen[-1].json["prompt"] == "p\nPlan: light. Draw light."

    best = endpoint_system(tool, "best-of", Budget(candidates=3), vlm)
    (chosen,) = best.generate(["p"], [1])
    assert (len(chosen.trajectory.generated), chosen.trajectory.verdict.score) == (3, 0)
    assert best.settings["candidates"] == best.settings["max_steps"] == 3


def test_fields_that_a_server_refuses_stand_in_records_and_results(server, endpoint, tmp_path):
    def answer(seen):
        if "chat" in seen.path:
            refused = next((name for name in ("seed", "temperature") if name in seen.json), None)
            said = completion("Plan: light. Draw light.")
        else:
            refused = next((name for name in ("seed", "response_format") if name in seen.json), None)
            said = pictures(png(flat(255)))
        return failure(400, f"Unknown parameter: '{refused}'.") if refused else said

    server.script = [answer]
    tool = OpenAIImageModel(endpoint(), response_format="b64_json", sends_seed=True)
    image_notes = [
        f"{tool.name}: response_format left out",
        f"{tool.name}: seed left out; images may differ from run to run",
    ]
    results = go(endpoint_system(tool, in_flight=2), tmp_path / "one-shot")
    assert results["generator_adapted"] == image_notes
    record = json.loads((tmp_path / "one-shot" / "00005" / "records" / "0000.json").read_text())
    assert sorted(record["adapted"]) == image_notes
    # The run is complete, and a tool that has asked nothing yet knows no notes: those on disk count.
    again = go(endpoint_system(OpenAIImageModel(endpoint())), tmp_path / "one-shot")
    assert again["generator_adapted"] == image_notes

    vlm = OpenAIChatModel(replace(endpoint(), model="planner"))
    planned = go(endpoint_system(tool, "open-loop", None, vlm), tmp_path / "planned")
    assert planned["generator_adapted"] == sorted([*image_notes, *(f"{vlm.name}: {note}" for note in vlm.adapted)])
    assert len(vlm.adapted) == 2

    server.script = [pictures(png(flat(255)))]
    assert go(endpoint_system(OpenAIImageModel(endpoint())), tmp_path / "obeyed")["generator_adapted"] == []
    record = json.loads((tmp_path / "obeyed" / "00000" / "records" / "0000.json").read_text())
    assert "adapted" not in record


def test_a_benchmark_says_what_requests_for_images_lacked(server, endpoint, tmp_path):
    def answer(seen):
        if "chat" in seen.path:
            return completion(GOOD)
        return failure(400, "Unknown parameter: 'seed'.") if "seed" in seen.json else pictures(png(flat(255)))

    server.script = [answer]
    benchmark = ImagineBench()
    items = benchmark.read(write_lines(tmp_path / "prompts.jsonl", IMAGINE))
    tool = OpenAIImageModel(endpoint(), sends_seed=True)
    generate_images(benchmark, items, endpoint_system(tool), tmp_path / "run", settings={}, samples=1)
    judge = JudgeModel(OpenAIChatModel(endpoint()))
    results = score_judged(benchmark, load_generated(benchmark, tmp_path / "run"), judge)
    note = f"{tool.name}: seed left out; images may differ from run to run"
    assert (results["adapted"], results["generator_adapted"]) == ([], [note])
    text = "\n".join(notes(results))
    assert f"requests differ from those to other servers: {note}" in text


def test_a_benchmark_of_an_endpoint_needs_no_jax():
    """JAX, the models and Orbax take 170 MiB, of which a run against servers has no use."""
    code = (
        "import sys\n"
        "import clvr_jax.commands.eval.benchmarks, clvr_jax.evaluation.harness.scoring\n"
        "import clvr_jax.evaluation.judging.judges, clvr_jax.evaluation.systems.endpoints\n"
        "import clvr_jax.providers.openai_chat, clvr_jax.providers.openai_images\n"
        "print(sorted({'jax', 'flax', 'orbax', 'tensorstore'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout == "[]\n"
