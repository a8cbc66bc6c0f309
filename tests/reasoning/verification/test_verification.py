import json
import math

import numpy as np
import pytest

from clvr_jax.data.shapes_augmentation import random_canvas
from clvr_jax.data.shapes_verification import random_requirement
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.interfaces import ChatResponse, Token
from clvr_jax.reasoning.verification.evidence import (
    answer_probability,
    evidence_probability,
    invents,
    is_consistent,
    least_clause_probability,
    names_required,
    omits,
)
from clvr_jax.reasoning.verification.model_verifier import ModelVerifier, read_requirements
from clvr_jax.reasoning.verification.verification import Requirement, Verification, comparison_reply
from clvr_jax.worlds.shapes.requirements import check_requirement, describe

IMAGE = np.zeros((4, 4, 3), np.uint8)


def answer(*parts: tuple[str, float], **top: float) -> ChatResponse:
    """An answer of tokens with probabilities; `top` are the likeliest tokens at the last one."""
    tokens = [Token(text, math.log(p)) for text, p in parts]
    last = tokens[-1]
    tokens[-1] = Token(last.text, last.logprob, {**{f" {word}": math.log(p) for word, p in top.items()}})
    return ChatResponse("".join(text for text, _ in parts), tokens=tuple(tokens))


class ScriptedModel:
    """Answers questions by a function of the last user turn and keeps them."""

    name = "scripted"

    def __init__(self, reply):
        self.reply, self.questions = reply, []

    def chat_all(self, questions):
        self.questions += questions
        found = [self.reply(question) for question in questions]
        return [each if isinstance(each, ChatResponse) else ChatResponse(each) for each in found]


def text_of(question) -> str:
    content = question.messages[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "[image]") for part in content)


def test_an_image_is_described_before_any_requirement_is_seen():
    def reply(question):
        text = text_of(question)
        if text == "[image]":
            return "I see red circle top."
        return "red circle top. yes" if "red circle" in text.split("Required:")[1] else "no blue star. no"

    model = ScriptedModel(reply)
    (found,) = ModelVerifier(model, is_instructed=False).check([("red circle", "blue star")], [IMAGE])
    assert [(each.met, each.evidence) for each in found.requirements] == [
        (True, "red circle top"),
        (False, "no blue star"),
    ]
    assert found.accepted is False
    assert found.unmet == ("blue star",)
    assert found.report == "I see red circle top. Unmet: blue star."
    described, *compared = model.questions
    assert (len(described.images), text_of(described), len(described.messages)) == (1, "[image]", 1)
    assert all(not question.images and len(question.messages) == 1 for question in compared)


def test_the_mode_ask_shows_the_image_with_every_requirement():
    model = ScriptedModel(lambda question: "A red circle. Yes.")
    (found,) = ModelVerifier(model, "ask").check([("red circle", "a dog")], [IMAGE])
    assert found.accepted is True
    assert [len(question.images) for question in model.questions] == [1, 1]
    assert all(question.messages[0]["role"] == "system" for question in model.questions)


@pytest.mark.parametrize("said", ["maybe", "", "yes and no, it depends", "I cannot tell. Yes or no?!x"])
def test_neither_yes_nor_no_is_never_met(said):
    (found,) = ModelVerifier(ScriptedModel(lambda question: said), "ask").check([("a dog",)], [IMAGE])
    assert found.requirements[0].met is None
    assert (found.accepted, found.unmet, found.probability) == (False, ("a dog",), None)


def test_without_token_probabilities_the_answer_counts_and_no_probability_is_made_up():
    (found,) = ModelVerifier(ScriptedModel(lambda question: "Here it is. yes"), "ask").check([("a dog",)], [IMAGE])
    assert (found.accepted, found.probability, found.score) == (True, None, 1.0)


def test_the_probability_is_that_of_yes_against_no():
    said = answer(("A dog", 0.9), (".", 0.9), (" yes", 0.6), yes=0.6, no=0.2)
    assert answer_probability(said) == pytest.approx(0.75)
    in_pieces = answer(("A dog.", 0.9), (" y", 0.6), y=0.6, n=0.3)
    assert answer_probability(ChatResponse(in_pieces.text + "es", tokens=(*in_pieces.tokens, Token("es", 0.0)))) == (
        pytest.approx(0.6 / 0.9)
    )


def test_a_space_that_is_a_token_of_its_own_leads_to_the_word_that_is_spelled_so():
    """The tokenizer of shapes-tiny writes " yes" as three tokens and " no" as one."""
    space = Token(" ", math.log(0.6), {" ": math.log(0.6), " no": math.log(0.4)})
    yes = ChatResponse(
        "A dog. yes", tokens=(Token("A dog.", 0.0), space, Token("y", 0.0, {"y": 0.0}), Token("es", 0.0))
    )
    assert answer_probability(yes) == pytest.approx(0.6)
    no = Token(" no", math.log(0.7), {" no": math.log(0.7), " ": math.log(0.3)})
    assert answer_probability(ChatResponse("A dog. no", tokens=(Token("A dog.", 0.0), no))) == pytest.approx(0.3)


def test_evidence_is_as_certain_as_the_clauses_it_quotes():
    described = answer(("I see", 1.0), (" red star top", 0.9), (";", 1.0), (" blue cross left", 0.5), (".", 1.0))
    assert evidence_probability(described, "red star top") == pytest.approx(0.9)
    assert evidence_probability(described, "blue cross left; red star top") == pytest.approx(0.45)
    assert evidence_probability(described, "no green circle") == pytest.approx(0.45)
    assert evidence_probability(ChatResponse("I see red star top."), "red star top") == 1.0
    assert least_clause_probability(described, "blue cross left; red star top") == pytest.approx(0.5)
    assert least_clause_probability(described, "one: red star top") == pytest.approx(0.9)
    assert least_clause_probability(ChatResponse("I see red star top."), "red star top") == 1.0


@pytest.mark.parametrize(
    ("is_instructed", "quoted", "is_met"),
    [(False, "red star top", True), (False, "red star top; blue cross left", False), (True, "blue cross left", True)],
)
def test_a_yes_rests_on_no_clause_that_a_trained_model_doubts(is_instructed, quoted, is_met):
    """Each clause counts by itself: many clauses of .9 make no doubt, one of .6 does."""

    def reply(question):
        if question.images:
            return answer(("I see", 1.0), (" red star top", 0.9), (";", 1.0), (" blue cross left", 0.6), (".", 1.0))
        return answer((f"{quoted}.", 1.0), (" yes", 1.0), yes=1.0)

    verifier = ModelVerifier(ScriptedModel(reply), is_instructed=is_instructed, clause_threshold=0.7)
    ((found,),) = (checked.requirements for checked in verifier.check([(quoted.split("; ")[-1],)], [IMAGE]))
    assert found.met is is_met
    assert found.probability > 0.5


@pytest.mark.parametrize(
    ("met", "probability", "doubt", "state"),
    [
        (True, 0.9, "", "met"),
        (True, 0.4, "", "met"),  # a threshold below one half
        (False, 0.67, "", "doubt"),
        (False, 0.4, "red star top", "doubt"),
        (False, None, "red star top", "doubt"),
        (False, 0.5, "", "unmet"),
        (False, None, "", "unmet"),
        (None, 0.9, "", "no answer"),
    ],
)
def test_a_requirement_in_doubt_is_unmet(met, probability, doubt, state):
    requirement = Requirement("red star", met, probability, doubt=doubt)
    assert (requirement.state, requirement.is_doubtful) == (state, state == "doubt")
    assert Verification((requirement,)).unmet == (() if met else ("red star",))


def test_evidence_that_a_trained_model_invents_is_no_evidence():
    def reply(question):
        if question.images:
            return answer(("I see", 1.0), (" red star top", 1.0), (".", 1.0))
        return answer(("red circle top.", 1.0), (" yes", 1.0), yes=1.0)

    (found,) = ModelVerifier(ScriptedModel(reply), is_instructed=False).check([("red circle",)], [IMAGE])
    assert (found.requirements[0].met, found.requirements[0].probability) == (False, 0.0)
    without = ScriptedModel(lambda question: reply(question).text)
    (found,) = ModelVerifier(without, is_instructed=False).check([("red circle",)], [IMAGE])
    assert (found.requirements[0].met, found.requirements[0].probability) == (False, None)
    (found,) = ModelVerifier(ScriptedModel(reply)).check([("red circle",)], [IMAGE])
    assert found.requirements[0].met is True, "large models may say it in other words"
    assert not invents("I see red star top; blue cross left.", "two objects", "blue cross left; two objects")
    assert not invents("Plan: red star top; blue cross left.", "red star", "red star top")
    assert not invents("I see red star top; blue cross left.", "two objects", "one: red star top; two: blue cross left")
    for miscounted in (
        "one: red star top",
        "one: red star top; three: blue cross left",
        "one: a; two: blue cross left",
    ):
        assert invents("I see red star top; blue cross left.", "two objects", miscounted)
    twice = "red star top; red star top"
    assert invents("I see red star top.", "two red stars", twice)
    assert not invents("I see red star top.", "red star above star", twice), "once on each side of a relation"


SEEN = "I see red star top; blue cross left; red cross right; something unclear bottom."


@pytest.mark.parametrize(
    ("requirement", "answer", "expected"),
    [
        ("red star top", "red star top. yes", True),
        ("red star top", "blue cross left. yes", False),  # not what is required
        ("green star", "no green star. no", True),
        ("red star", "no red star. no", False),  # denies what is shown
        ("red star top left", "nothing top left. no", True),
        ("red star top", "nothing top. no", False),
        ("red star bottom", "something unclear bottom. no", True),
        ("red star bottom", "green star bottom. no", False),  # not in the description
        ("red star left of blue cross", "red star top; blue cross left. no", True),
        ("red star left of blue cross", "blue cross left. no", False),  # leaves out the star
        ("two red crosses", "no red cross. no", False),
        ("three objects", "one: red star top; two: blue cross left; three: red cross right. no", False),
        (
            "three objects",
            "one: red star top; two: blue cross left; three: red cross right; something unclear bottom. no",
            True,
        ),
        (
            "three objects",
            "one: red star top; two: blue cross left; three: red cross right; something unclear bottom. yes",
            False,
        ),
        ("red star top", "I cannot tell", True),  # no answer is a matter of its own
    ],
)
def test_an_answer_that_contradicts_the_description_is_found(requirement, answer, expected):
    assert is_consistent(SEEN, requirement, answer) is expected


@pytest.mark.parametrize(
    ("requirement", "said", "expected"),
    [("two objects", "yes", True), ("two objects", "no", False), ("three objects", "yes", False)],
)
def test_a_count_agrees_with_the_answer(requirement, said, expected):
    counted = "one: red star top; two: blue cross left"
    assert is_consistent("I see red star top; blue cross left.", requirement, f"{counted}. {said}") is expected


def test_exact_answers_are_consistent_with_their_descriptions():
    rng = np.random.default_rng(5)
    checked = 0
    while checked < 600:
        reading = random_canvas(rng).reading()
        for requirement in (random_requirement(rng, reading) for _ in range(6)):
            checked += 1
            answer = comparison_reply(*check_requirement(requirement, reading))
            assert is_consistent(describe(reading), str(requirement), answer), (describe(reading), requirement, answer)


def test_only_requirements_without_a_place_need_all_objects_of_their_kind():
    described = "I see red star top; red star left."
    assert omits(described, "two red stars", "red star top")
    assert not omits(described, "red star top", "red star top")
    assert not omits(described, "two red stars", "red star top; red star left")


def test_an_answer_that_contradicts_the_description_is_sampled_again():
    def reply(question):
        if question.images:
            return "I see red star top."
        good = {2: "red star top. yes", 3: "red star top. yes, surely"}
        return good.get(question.seed, "no red star. no") if question.temperature else "no red star. no"

    model = ScriptedModel(reply)
    (found,) = ModelVerifier(model, is_instructed=False).check([("red star",)], [IMAGE])
    assert (found.accepted, len(model.questions)) == (True, 1 + 1 + 4)  # attempts 2 and 3 share a batch
    assert [question.seed for question in model.questions if question.temperature] == [0, 1, 2, 3]
    stubborn = ScriptedModel(lambda question: "I see red star top." if question.images else "no red star. no")
    (found,) = ModelVerifier(stubborn, is_instructed=False, comparison_retries=2).check([("red star",)], [IMAGE])
    assert (found.accepted, len(stubborn.questions)) == (False, 1 + 1 + 2)
    large = ScriptedModel(stubborn.reply)
    ModelVerifier(large).check([("red star",)], [IMAGE])
    assert len(large.questions) == 2, "a model that was not trained to quote may say it in other words"


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_doubt_about_the_description_never_turns_a_no_into_a_yes(threshold):
    def reply(question):
        if question.images:
            return ChatResponse("I see red star top.", tokens=(Token("I see red star top.", -1000.0),))
        return answer(("no blue star.", 1.0), (" no", 1.0), no=1.0)

    verifier = ModelVerifier(ScriptedModel(reply), is_instructed=False, threshold=threshold)
    (found,) = verifier.check([("blue star",)], [IMAGE])
    assert found.requirements[0].probability == 0.5
    assert found.accepted is False


@pytest.mark.parametrize(
    ("requirement", "evidence", "expected"),
    [
        ("purple triangle bottom left", "purple circle bottom left", False),
        ("purple triangle bottom left", "purple triangle bottom left", True),
        ("red star left", "red star right", False),
        ("red star left of blue cross", "red star right; blue cross top", True),  # the relation is the model's to judge
        ("two crosses above red star", "blue cross top; red cross left; red star bottom", True),
        ("two blue crosses", "blue star top; blue star left", False),
        ("four objects", "four objects", True),
    ],
)
def test_a_yes_must_name_what_is_required(requirement, evidence, expected):
    assert names_required(requirement, evidence) is expected
    description = f"I see {evidence}."
    model = ScriptedModel(lambda question: description if question.images else f"{evidence}. yes")
    (found,) = ModelVerifier(model, is_instructed=False).check([(requirement,)], [IMAGE])
    assert found.requirements[0].met is expected


def test_an_uncertain_description_makes_a_yes_uncertain():
    def reply(question):
        if question.images:
            return answer(("I see", 1.0), (" red star top", 0.3), (".", 1.0))
        return answer(("red star top.", 1.0), (" yes", 1.0), yes=1.0)

    (found,) = ModelVerifier(ScriptedModel(reply)).check([("red star",)], [IMAGE])
    assert found.requirements[0].probability == pytest.approx(0.3)
    assert found.accepted is False


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Required: a red star; a dog left of it.", ("a red star", "a dog left of it")),
        ("Certainly.\nRequired: one thing", ("one thing",)),
        ("Required: nothing.", ()),
        ("Required: none", ()),
        ("I cannot.", None),
        ("Required: .", None),
    ],
)
def test_requirements_are_read(reply, found):
    assert read_requirements(reply) == found


def test_requirements_are_asked_for_again_and_then_refused():
    model = ScriptedModel(lambda question: "Required: a dog." if question.seed else "hm")
    assert ModelVerifier(model).derive(["a dog"]) == [("a dog",)]
    assert [question.temperature > 0 for question in model.questions] == [False, True]
    with pytest.raises(ClvrError, match=r"scripted lists no requirements of the prompt 'a dog' but says 'hm'"):
        ModelVerifier(ScriptedModel(lambda question: "hm")).derive(["a dog"])


def test_a_prompt_without_requirements_has_nothing_to_accept():
    model = ScriptedModel(lambda question: "Required: nothing." if not question.images else "I see it.")
    (found,) = ModelVerifier(model).verify(["hello"], [IMAGE])
    assert (found.accepted, found.requirements, found.probability) == (None, (), None)


def test_requirements_of_a_prompt_are_derived_once():
    model = ScriptedModel(lambda question: "Required: a dog." if "Required of" in text_of(question) else "A dog. yes")
    found = ModelVerifier(model, "ask").verify(["a dog", "a dog"], [IMAGE, IMAGE])
    assert [each.accepted for each in found] == [True, True]
    assert sum("Required of" in text_of(question) for question in model.questions) == 1


def test_numbers_must_agree():
    with pytest.raises(UsageError, match="2 prompts but 1 images"):
        ModelVerifier(ScriptedModel(str)).verify(["a", "b"], [IMAGE])
    with pytest.raises(UsageError, match="mode must be one of describe, ask"):
        ModelVerifier(ScriptedModel(str), "look")


def test_a_verification_survives_json():
    found = Verification((Requirement("a", True, 0.9, "a top"), Requirement("b", None)), "I see a.", "describe", "m")
    assert Verification.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    "change",
    [
        {"requirements": [{"text": "a", "met": "yes"}]},
        {"requirements": [{"text": "a", "met": True, "probability": 1.5}]},
        {"requirements": [{"text": 3, "met": True}]},
        {"requirements": [{"text": "a", "met": True, "more": 1}]},
        {"description": 4},
        {"more": 1},
    ],
)
def test_a_malformed_verification_is_refused(change):
    with pytest.raises(ClvrError, match="verification: malformed"):
        Verification.from_dict({"requirements": [], **change})
