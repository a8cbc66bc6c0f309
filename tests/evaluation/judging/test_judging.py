"""A real HTTP server on loopback as the judge."""

import base64
import dataclasses
import json
import os
import re
import threading

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.dpg import DPG
from clvr_jax.evaluation.benchmarks.genevalpp import GenEvalPP
from clvr_jax.evaluation.benchmarks.imaginebench import ImagineBench
from clvr_jax.evaluation.comparison.pairs import compare
from clvr_jax.evaluation.harness.images import generate_images, load_generated
from clvr_jax.evaluation.judging.judges import local_judge
from clvr_jax.evaluation.judging.questions import JudgeModel
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.providers.endpoint import Prices
from clvr_jax.providers.openai_chat import OpenAIChatModel
from tests.evaluation.benchmarks.samples import DPG as DPG_CSV
from tests.evaluation.benchmarks.samples import GENEVALPP, IMAGINE, ColorGenerator, write_lines
from tests.evaluation.runs import score_judged
from tests.providers.server import Reply, completion, failure

GOOD = "Fantasy Fulfillment: 8\nIdentity Preservation: 9\nAesthetic Quality: 7"


@pytest.fixture
def judge(endpoint):
    def make(in_flight=4, **fields):
        model = OpenAIChatModel(endpoint(max_in_flight=in_flight, prices=Prices(1.0, 2.0), **fields))
        return JudgeModel(model, "weights-1", in_flight)

    return make


@pytest.fixture
def imagine(tmp_path):
    benchmark = ImagineBench()
    items = benchmark.read(write_lines(tmp_path / "prompts.jsonl", IMAGINE))
    generate_images(benchmark, items, ColorGenerator().system, tmp_path / "out", settings={}, samples=1)
    return benchmark, load_generated(benchmark, tmp_path / "out")


def asked(seen):
    """The text and the picture's address of a request."""
    picture, text = seen.json["messages"][0]["content"]
    return text["text"], picture["image_url"]["url"]


def test_a_judge_sees_the_file_and_the_rubric_greedily(server, judge, imagine, tmp_path):
    server.script = [completion(GOOD)]
    results = score_judged(*imagine, judge())
    assert results["summary"]["overall"]["score"] == pytest.approx(7.8)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["benchmark"] == "imaginebench-fixed"
    assert (results["judge"]["name"], results["judge"]["revision"]) == (judge().model.name, "weights-1")
    assert results["summary"]["judging"]["calls"] == 4
    assert results["summary"]["judging"]["dollars"] == pytest.approx(4 * (11 + 2 * 7) / 1e6)
    assert results["summary"]["cost"]["nfe_per_picture"] == 4
    assert results["pictures"][0]["parts"] == {
        "Fantasy Fulfillment": 8.0, "Identity Preservation": 9.0, "Aesthetic Quality": 7.0
    }  # fmt: skip
    for request in server.seen:
        text, url = asked(request)
        assert request.json["temperature"] == 0
        assert re.search(r"A photo of \d\.", text)
        assert url.startswith("data:image/png;base64,")
    assert {asked(request)[1] for request in server.seen} == {
        "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for path in imagine[1].files.values()
    }


def test_a_second_run_asks_nothing_and_a_new_picture_is_looked_at(server, judge, imagine, tmp_path):
    server.script = [completion(GOOD)]
    first = score_judged(*imagine, judge())
    again = score_judged(*imagine, judge())
    assert (again["summary"], len(server.seen)) == (first["summary"], 4)
    other = imagine[1].files[1, 0]
    other.write_bytes(imagine[1].files[0, 0].read_bytes())
    score_judged(*imagine, judge())
    assert len(server.seen) == 5
    score_judged(*imagine, JudgeModel(judge().model, "weights-2"))  # another judge
    assert len(server.seen) == 9


def test_a_killed_run_asks_no_question_twice(server, judge, imagine, tmp_path):
    server.script = [completion(GOOD), completion(GOOD), failure(401, "no such key")]
    with pytest.raises(
        ClvrError, match=r"401.*2 of 4 images are judged, and their replies are kept; run again"
    ) as caught:
        score_judged(*imagine, judge(in_flight=1))
    assert "\n" not in str(caught.value)
    (path,) = (tmp_path / "out" / "replies").iterdir()
    path.write_bytes(path.read_bytes() + b'{"key": "cut of')  # killed while it wrote
    before = {asked(request) for request in server.seen[:2]}
    server.seen.clear()
    server.script = [completion(GOOD)]
    results = score_judged(*imagine, judge())
    assert len(server.seen) == 2
    assert not before & {asked(request) for request in server.seen}
    assert results["summary"]["judging"]["calls"] == 4
    assert len(score_judged(*imagine, judge())["pictures"]) == 4
    assert len(server.seen) == 2


def test_replies_that_cannot_be_read_are_asked_again_with_the_reason(server, judge, imagine):
    replies = ["I like it.", "Fantasy Fulfillment: 8", GOOD]
    server.script = [completion(text) for text in replies] + [completion(GOOD)]
    results = score_judged(*imagine, judge(in_flight=1))
    texts = [asked(request)[0] for request in server.seen]
    assert len(texts) == 6
    assert "could not be used: no line Fantasy Fulfillment" in texts[1]
    assert "could not be used: no line Identity Preservation" in texts[2]
    assert results["summary"]["unreadable"] == []


@pytest.mark.parametrize(
    "reply",
    [
        completion(""),
        completion(None),
        completion("<think>Fantasy Fulfillment: 1"),
        completion(GOOD, finish="length"),
        Reply(b""),
        Reply(b"<html>log in</html>"),
        Reply({"choices": []}),
    ],
)
def test_no_reply_is_no_score_and_is_asked_for_again(reply, server, judge, imagine, tmp_path):
    server.script = [completion(GOOD), reply]
    with pytest.raises(ClvrError, match="1 of 4 images are judged, and their replies are kept; run again"):
        score_judged(*imagine, judge(in_flight=1))
    assert not (tmp_path / "out" / "results.json").exists()
    server.script = [completion(f"<think>{GOOD.replace('8', '1')}</think>{GOOD}")]
    results = score_judged(*imagine, judge())
    assert results["summary"]["unreadable"] == []
    assert [entry["score"] for entry in results["pictures"]] == pytest.approx([7.8] * 4)


@pytest.mark.parametrize(
    ("reply", "kind", "other"),
    [
        (completion("prose only"), "unreadable", "refused"),
        (completion(None, refusal="I will not."), "refused", "unreadable"),
    ],
)
def test_a_picture_without_scores_counts_as_failed_and_is_listed(reply, kind, other, server, judge, imagine):
    server.script = [reply] * 3 + [completion(GOOD)]
    results = score_judged(*imagine, judge(in_flight=1))
    assert (results["summary"][kind], results["summary"][other]) == (["1/0"], [])
    again = score_judged(*imagine, judge())
    assert again["summary"][kind] == ["1/0"]
    assert (results["pictures"][0]["score"], results["pictures"][1]["score"]) == (0, pytest.approx(7.8))
    assert len(server.seen) == 6


def test_a_judge_of_which_no_reply_can_be_read_scores_nothing(server, judge, imagine, tmp_path):
    server.script = [completion("Service unavailable, please log in.")]
    with pytest.raises(ClvrError, match=r"none of its replies about 4 images can be parsed .*'Service un") as caught:
        score_judged(*imagine, judge())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists()
    asked_before = len(server.seen)
    server.script = [completion(GOOD)]
    assert score_judged(*imagine, judge())["summary"]["overall"]["score"] == pytest.approx(7.8)
    assert len(server.seen) == asked_before + 4


def one_image(tmp_path):
    benchmark = ImagineBench()
    items = benchmark.read(write_lines(tmp_path / "one.jsonl", IMAGINE[:1]))
    generate_images(benchmark, items, ColorGenerator().system, tmp_path / "one", settings={}, samples=1)
    return benchmark, load_generated(benchmark, tmp_path / "one")


def test_of_one_image_alone_an_unreadable_reply_is_a_failed_image_and_is_listed(server, judge, tmp_path):
    """One reply does not tell a judge that cannot judge from a judge that is down."""
    server.script = [completion("Service unavailable, please log in.")]
    results = score_judged(*one_image(tmp_path), judge())
    assert results["summary"]["unreadable"] == ["1/0"]
    assert [entry["score"] for entry in results["pictures"]] == [0]
    assert len(server.seen) == 3  # the same question, twice more with what was wrong


@pytest.mark.parametrize("rules", ["fixed", "official"])
@pytest.mark.parametrize("reply", [completion(""), Reply(b""), Reply(b"<html>log in</html>"), failure(503)])
def test_of_one_image_alone_no_reply_is_no_score(reply, rules, server, judge, tmp_path):
    server.script = [reply]
    with pytest.raises(ClvrError, match="0 of 1 images are judged"):
        score_judged(ImagineBench(rules), one_image(tmp_path)[1], judge(max_retries=0))
    assert not (tmp_path / "one" / "results.json").exists()


def test_by_official_rules_a_judge_of_which_no_reply_can_be_read_scores_nothing(server, judge, imagine, tmp_path):
    server.script = [completion("Service unavailable, please log in.")]
    with pytest.raises(ClvrError, match="none of its replies about 4 images can be parsed"):
        score_judged(ImagineBench("official"), imagine[1], judge())
    assert not (tmp_path / "out" / "results.json").exists()
    assert len(server.seen) == 4  # official rules ask once


def test_by_official_rules_one_reply_without_scores_is_minus_1_and_is_listed(server, judge, imagine):
    server.script = [completion("I cannot judge this."), completion(GOOD)]
    results = score_judged(ImagineBench("official"), imagine[1], judge(in_flight=1))
    assert results["summary"]["unreadable"] == ["1/0"]
    assert [entry["score"] for entry in results["pictures"]] == pytest.approx([-1, 7.8, 7.8, 7.8])
    assert len(server.seen) == 4


@pytest.mark.parametrize("reply", [None, "", " \n"])
def test_a_stored_reply_that_is_none_is_asked_for_again(reply, server, judge, imagine, tmp_path):
    """Earlier versions stored what a dead server said as the judge's reply."""
    server.script = [completion(GOOD)]
    first = score_judged(*imagine, judge())
    (path,) = (tmp_path / "out" / "replies").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2] = {**lines[2], "reply": reply, "error": "HTTP 200: <html>"}
    write_lines(path, lines)
    again = score_judged(*imagine, judge())
    assert len(server.seen) == 5
    assert again["summary"]["overall"] == first["summary"]["overall"]
    assert len(score_judged(*imagine, judge())["pictures"]) == 4
    assert len(server.seen) == 5


def test_what_the_judges_server_does_not_take_is_in_the_results_of_every_run(server, judge, imagine):
    def answer(seen):
        if "temperature" in seen.json:
            return failure(400, "Unsupported parameter: 'temperature' is not supported with this model.")
        return completion(GOOD)

    server.script = [answer]
    (note,) = score_judged(*imagine, judge())["adapted"]
    assert note.startswith("temperature")
    assert score_judged(*imagine, judge())["adapted"] == [note]  # of the replies on disk


@pytest.mark.parametrize(
    "change", [{"usage": {"calls": "x"}}, {"usage": {"cost": 1}}, {"fault": "tired"}, {"adapted": 3}, {"reply": 3}]
)
def test_a_stored_reply_of_another_form_is_refused_with_its_line(change, server, judge, imagine, tmp_path):
    server.script = [completion(GOOD)]
    score_judged(*imagine, judge())
    (path,) = (tmp_path / "out" / "replies").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [*lines[:2], {**lines[2], **change}])
    with pytest.raises(ClvrError, match=r"jsonl:3: not a reply of a judge .*; remove the line"):
        score_judged(*imagine, judge())


def test_official_rules_take_what_they_get(server, judge, imagine):
    server.script = [completion(GOOD.replace("Fantasy Fulfillment", "**Fantasy Fulfillment**"))]
    results = score_judged(ImagineBench("official"), imagine[1], judge())
    assert len(server.seen) == 4
    assert results["pictures"][0]["score"] == pytest.approx(round(-0.8 + 0.2 * 7, 3))
    assert results["benchmark"] == "imaginebench-official"
    assert "Multi-Object" in results["faults"][0]


def test_graded_results_are_compared_prompt_by_prompt(server, judge, imagine):
    server.script = [completion(GOOD)]
    first = score_judged(*imagine, judge())
    server.script = [completion(GOOD.replace("8", "10"))]
    other = judge()
    second = score_judged(*imagine, JudgeModel(other.model, "weights-2"))
    part = compare(first, {**second, "judge": first["judge"]})["overall"]
    assert (part["difference"], part["second_wins"]) == (pytest.approx(0.8), 4)
    with pytest.raises(ClvrError, match="judge differs"):
        compare(first, second)
    with pytest.raises(ClvrError, match="benchmark differs"):
        compare(first, score_judged(ImagineBench("official"), imagine[1], other))


def test_rate_limits_are_waited_for(server, judge, imagine):
    server.script = [failure(429, "slow down", {"retry-after-ms": "5"}), completion(GOOD)]
    assert score_judged(*imagine, judge())["summary"]["judging"]["retries"] >= 1


def test_as_many_questions_as_allowed_are_in_flight(server, judge, imagine):
    server.script = [completion(GOOD)]
    server.hold_until(4)
    score_judged(*imagine, judge(in_flight=4))
    assert server.peak == 4


def test_genevalpp_sends_its_jpg_and_a_missing_verdict_is_wrong(server, judge, tmp_path):
    benchmark = GenEvalPP()
    items = benchmark.read(write_lines(tmp_path / "prompts.jsonl", GENEVALPP))
    generate_images(benchmark, items, ColorGenerator().system, tmp_path / "out", settings={}, samples=1)
    verdicts = iter(['```json\n{"correct": 1, "reason": ""}\n```', *['{"correct": "maybe"}'] * 3])
    lock = threading.Lock()

    def answer(seen):
        with lock:
            return completion(next(verdicts))

    server.script = [answer]
    results = score_judged(benchmark, load_generated(benchmark, tmp_path / "out"), judge(in_flight=1))
    assert [row["correct"] for row in results["pictures"]] == [True, False]
    assert results["summary"]["tags"]["counting"]["interval"][1] == 1  # Wilson's
    assert results["summary"]["overall"]["score"] == 0.5
    assert asked(server.seen[0])[1].startswith("data:image/jpeg;base64,")


def test_dpg_asks_each_question_about_each_part_of_the_grid(server, judge, tmp_path):
    benchmark = DPG()
    (tmp_path / "d.csv").write_text(DPG_CSV.format(dependency="2"))
    generate_images(
        benchmark, benchmark.read(tmp_path / "d.csv"), ColorGenerator().system, tmp_path / "out", settings={}, samples=4
    )
    server.script = [lambda seen: completion("No." if "mat?" in asked(seen)[0] else "Yes")]
    results = score_judged(benchmark, load_generated(benchmark, tmp_path / "out"), judge(in_flight=8))
    assert len(server.seen) == 4 * (3 + 4)
    assert len({asked(request)[1] for request in server.seen}) == 8
    by_id = {row["id"]: row for row in results["pictures"]}
    assert by_id["a"]["score"] == pytest.approx(100 / 3)  # no mat, so no red mat either
    assert by_id["a"]["parts"] == {"entity": 50, "attribute": 100}
    assert by_id["b"]["score"] == 100
    group = results["summary"]["tags"]["dense"]
    assert (group["prompts"], group["pictures"]) == (2, 8)
    official = score_judged(DPG("official"), load_generated(benchmark, tmp_path / "out"), judge(in_flight=8))
    assert official["pictures"][0]["score"] == 0
    assert len(server.seen) == 4 * (3 + 4)  # nothing new was asked


def test_a_reply_file_of_another_program_is_refused(server, judge, imagine, tmp_path):
    server.script = [completion(GOOD)]
    score_judged(*imagine, judge())
    (path,) = (tmp_path / "out" / "replies").iterdir()
    path.write_text('{"some": "thing"}\n' + path.read_text())
    with pytest.raises(ClvrError, match=r"jsonl:1: not a reply of a judge"):
        score_judged(*imagine, judge())
    assert os.listdir(tmp_path / "out" / "replies") == [path.name]


@pytest.mark.slow
def test_our_own_model_judges_too(imagine, tmp_path):
    judge = local_judge(str(SHIPPED / "shapes-tiny" / "controller"), max_tokens=4)
    whole = imagine[1]
    pictures = dataclasses.replace(whole, files={(0, 0): whole.files[0, 0]})
    results = score_judged(ImagineBench("official"), pictures, judge)
    assert results["judge"]["name"] == "controller"
    assert len(results["judge"]["revision"]) == 16
    assert results["summary"]["judging"]["output_tokens"] == 4
    assert results["pictures"][0]["score"] == -1  # it plans pictures of shapes, whatever it is asked
