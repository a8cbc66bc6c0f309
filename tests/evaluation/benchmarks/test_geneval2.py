"""GenEval 2: its prompts, and Soft-TIFA from the probabilities of a judge's first token."""

import json
import math

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.geneval2 import GenEval2, accepted, geometric_mean
from clvr_jax.evaluation.harness.images import generate_images, load_generated
from clvr_jax.evaluation.judging.judges import local_judge
from clvr_jax.evaluation.judging.questions import JudgeModel, first_word_probability
from clvr_jax.interfaces import ChatResponse
from clvr_jax.interfaces.chat import Token
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.providers.openai_chat import OpenAIChatModel
from tests.evaluation.benchmarks.samples import GENEVAL2, ColorGenerator, write_lines
from tests.evaluation.runs import score_judged
from tests.providers.server import completion


@pytest.fixture
def prompts(tmp_path):
    return write_lines(tmp_path / "prompts.jsonl", GENEVAL2)


@pytest.fixture
def images(prompts, tmp_path):
    benchmark = GenEval2()
    generate_images(
        benchmark, benchmark.read(prompts), ColorGenerator().system, tmp_path / "out", settings={}, samples=1
    )
    return benchmark, load_generated(benchmark, tmp_path / "out")


@pytest.fixture
def judge(endpoint):
    return JudgeModel(OpenAIChatModel(endpoint(max_in_flight=1)), "weights-1", 1)


def reply(text, probabilities):
    """A completion of one token whose alternatives have these probabilities."""
    found = completion(text)
    top = [{"token": word, "logprob": math.log(value)} for word, value in probabilities.items()]
    entry = {"token": text, "logprob": math.log(probabilities[text]), "top_logprobs": top}
    found.content["choices"][0]["logprobs"] = {"content": [entry]}
    return found


def test_the_prompts_are_read_with_their_atoms(prompts):
    first, second = GenEval2().read(prompts)
    assert (first.id, first.prompt, first.tag, first.tier) == ("000", "two blue cups on a box", "4 atoms", 4)
    assert (second.id, second.tier) == ("001", 3)
    assert [asked.words for asked in GenEval2().questions(first)] == [("two", "2"), ("yes",), ("yes",), ("yes",)]
    assert "How many cups are in the image?" in GenEval2().questions(first)[0].text


def test_an_item_that_was_stored_has_its_tier_again(prompts):
    benchmark = GenEval2()
    for index, item in enumerate(benchmark.read(prompts)):
        assert benchmark.item(json.loads(json.dumps(benchmark.metadata(item))), index) == item


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"atom_count": "4"}, r":1: atom_count must be a number from 1 to 100, got '4'"),
        ({"atom_count": 0}, ":1: atom_count must be"),
        ({"vqa_list": [["How many?"]]}, ":1: vqa_list must be a list of pairs"),
        ({"vqa_list": "x"}, ":1: vqa_list must be"),
        ({"skills": ["count"]}, ":1: skills must name one of object, attribute, count, position, verb for each"),
        ({"skills": ["count", "color", "object", "position"]}, ":1: skills must"),
        ({"skills": None}, ":1: lacks skills"),
    ],
)
def test_bad_entries_say_where_and_what(changed, said, tmp_path):
    with pytest.raises(ClvrError, match=said):
        GenEval2().read(write_lines(tmp_path / "prompts", [{**GENEVAL2[0], **changed}]))


def test_a_number_may_be_a_word_or_digits():
    assert accepted("How many cups are in the image?", "seven") == ("seven", "7")
    assert accepted("Are the cups blue?", "Yes") == ("yes",)


def test_the_geometric_mean_is_zero_if_a_part_is():
    assert geometric_mean([0.5, 0.5, 0.5]) == pytest.approx(0.5)
    assert geometric_mean([1.0, 0.25]) == pytest.approx(0.5)
    assert geometric_mean([1.0, 0.0]) == 0.0


def test_spellings_of_a_word_add_up_and_an_absent_one_is_bounded():
    def probability(top, *words):
        token = Token("No", math.log(top["No"]), {text: math.log(value) for text, value in top.items()})
        return first_word_probability(ChatResponse("No", tokens=(token,)), words)

    top = {"No": 0.6, "Yes": 0.2, " yes": 0.1, "Maybe": 0.01}
    assert probability(top, "yes") == pytest.approx(0.3)
    assert probability(top, "no") == pytest.approx(0.6)
    assert probability(top, "two", "2") == pytest.approx(0.01)
    assert first_word_probability(ChatResponse("No"), ("yes",)) is None


def test_a_prompt_has_the_geometric_mean_of_its_probabilities(server, judge, images):
    sure, half = reply("Yes", {"Yes": 0.9, "No": 0.1}), reply("No", {"No": 0.5, "yes": 0.4})
    count = reply("2", {"2": 0.5, "two": 0.3, "three": 0.2})
    server.script = [count, sure, sure, half, sure]  # the last one for all that follow
    results = score_judged(*images, judge)
    first, second = results["pictures"]
    assert first["score"] == pytest.approx(100 * (0.8 * 0.9 * 0.9 * 0.4) ** 0.25)
    assert first["parts"] == pytest.approx(
        {"all atoms": 75.0, "object": 90.0, "attribute": 90.0, "count": 80.0, "position": 40.0}
    )
    assert first["reasons"] == ["Are the cups on the box? Yes (0.40)"]
    assert second["score"] == pytest.approx(100 * (0.1 * 0.9 * 0.9) ** (1 / 3))  # one is not among the answers
    summary = results["summary"]
    assert summary["overall"]["score"] == pytest.approx((first["score"] + second["score"]) / 2)
    assert {tier: group["prompts"] for tier, group in summary["tiers"].items()} == {"3": 1, "4": 1}
    assert summary["tiers"]["4"]["score"] == pytest.approx(first["score"])
    assert all(request.json["top_logprobs"] == 20 for request in server.seen)
    assert len(server.seen) == 7
    again = score_judged(*images, judge)
    assert (again["summary"], len(server.seen)) == (summary, 7)


def test_a_judge_without_probabilities_scores_nothing(server, judge, images):
    server.script = [completion("Yes")]
    with pytest.raises(ClvrError, match="gives no probabilities of tokens, of which this score is made") as caught:
        score_judged(*images, judge)
    assert "\n" not in str(caught.value)


def test_the_overall_score_is_the_mean_over_prompts():
    assert GenEval2().weights({"3 atoms": 3, "9 atoms": 1}) == {"3 atoms": 3.0, "9 atoms": 1.0}


@pytest.mark.slow
def test_our_own_model_gives_probabilities(images):
    results = score_judged(*images, local_judge(str(SHIPPED / "shapes-tiny" / "controller"), max_tokens=4))
    assert all(0 < image["score"] < 100 for image in results["pictures"])
