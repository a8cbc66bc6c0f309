"""Tests of roles of a language model: prompts, parsing of replies, and retries."""

import json
import re

import numpy as np
import pytest

from clvr_jax.data.engine.actions import ImageEdit, InitialGeneration, Turn
from clvr_jax.data.engine.engine import synthesize
from clvr_jax.data.engine.roles.base import Check, Event, History, PromptItem, Roles
from clvr_jax.data.engine.roles.prompted import (
    PromptedJudge,
    PromptedPlanner,
    PromptedTranslator,
    PromptedVerifier,
    template,
)
from clvr_jax.data.engine.roles.shapes import make_shapes_roles
from clvr_jax.interfaces import ChatResponse
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.reasoning.conversation.actions import strip_action
from tests.data.engine.exact_generator import MistakesAt, item

IMAGES = tuple(np.full((8, 8, 3), value, np.uint8) for value in (0, 100, 200))
TURN = Turn("empty", "begin", InitialGeneration("a red circle"))
EDIT = Turn("a circle", "a star lacks", ImageEdit("add a star", (0,)))
HISTORY = History(
    PromptItem("one", "a red circle and a star"),
    IMAGES[:2],
    (0, 1),
    (Event("generate_base_image", TURN, 0, (Check("Is there a circle?", True, "red"),)), Event("inspect", EDIT, 1)),
)


class Scripted:
    """Returns the given replies one after the other and records the requests."""

    name = "scripted"

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def chat(self, question):
        self.requests.append(question)
        answer = self.answers.pop(0)
        return ChatResponse(answer if isinstance(answer, str) else json.dumps(answer))

    def text(self, number=-1):
        return self.requests[number].messages[0]["content"][-1]["text"]


@pytest.mark.parametrize(
    "name", ["director", "checklist", "check", "validate", "judge", "replies", "verdict", "proxies"]
)
def test_templates_have_fields_and_the_braces_of_their_example(name):
    fields = set(re.findall(r"(?<!\{)\{(\w+)\}(?!\})", template(name)))
    filled = template(name).format(**dict.fromkeys(fields, "x"))
    assert re.search(r"\{\s*\"\w+\":", filled)
    assert "{{" not in filled


def test_the_planner_receives_the_path_the_log_and_the_error():
    model = Scripted("whatever it says")
    failed = History(HISTORY.item, HISTORY.images, (0, 1), (*HISTORY.events, Event("refine", error="no JSON object")))
    text = PromptedPlanner(model).turn(failed, "refine", ("IMAGE_EDIT", "RESULT_VALIDATION"), seed=7)
    assert text == "whatever it says"
    request = model.requests[0]
    assert (len(request.images), request.seed, request.is_json) == (2, 7, True)
    assert request.temperature > 0
    for part in ("a red circle and a star", "IMAGE_EDIT -> picture 1: add a star", "no JSON object", "0, 1", "refine"):
        assert part in model.text()
    assert "END_TRAJECTORY" not in model.text()


def test_a_checklist_is_written_for_the_edit_and_answered_on_the_new_image():
    model = Scripted({"questions": ["Is there a star?", "Is the circle red?"]})
    questions = PromptedVerifier(model).checklist(HISTORY, EDIT)
    assert "add a star" in model.text()
    assert len(model.requests[0].images) == 1
    answers = [{"answer": "Yes", "evidence": "a star"}, {"answer": "no", "evidence": "it is blue"}]
    model = Scripted({"answers": answers})
    checks = PromptedVerifier(model).check(HISTORY, EDIT, questions, IMAGES[2])
    assert checks == (Check("Is there a star?", True, "a star"), Check("Is the circle red?", False, "it is blue"))
    assert model.requests[0].images[-1] is IMAGES[2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("It looks fine to me.", "no JSON object"),
        ({"answers": [{"answer": "yes"}]}, "1 answers to 2 questions"),
        ({"answers": ["yes", "maybe"]}, "must be yes or no"),
        ({"answers": "yes"}, "no answers"),
    ],
)
def test_an_unreadable_reply_is_requested_once_more(wrong, message):
    questions = ("Is there a star?", "Is the circle red?")
    model = Scripted(wrong, {"answers": ["yes", "no"]})
    checks = PromptedVerifier(model).check(HISTORY, TURN, questions, IMAGES[0])
    assert [check.passed for check in checks] == [True, False]
    assert message in model.text(1)
    assert model.requests[0].seed != model.requests[1].seed
    with pytest.raises(AnswerError, match=message):
        PromptedVerifier(Scripted(wrong, wrong)).check(HISTORY, TURN, questions, IMAGES[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"accepted": "true", "gaps": []}, "true or false"),
        ({"accepted": True, "gaps": ["a star"]}, "accepted, but with gaps"),
        ({"accepted": False, "gaps": ["a star"], "roll_back_to": 2}, "one of 0, 1"),
        ({"accepted": False, "gaps": "a star"}, "list of texts"),
    ],
)
def test_a_contradictory_validation_is_an_error(wrong, message):
    with pytest.raises(AnswerError, match=message):
        PromptedVerifier(Scripted(wrong, wrong)).validate(HISTORY)
    right = {"accepted": False, "gaps": ["a star"], "feedback": "add it", "roll_back_to": 0}
    assert PromptedVerifier(Scripted(wrong, right)).validate(HISTORY).roll_back_to == 0


def test_a_judge_replies_with_one_of_three_words():
    assert PromptedJudge(Scripted({"better": " Second "})).prefer("p", *IMAGES[:2], 0) == "second"
    with pytest.raises(AnswerError, match="first, second or neither"):
        PromptedJudge(Scripted({"better": "both"}, {"better": "A"})).prefer("p", *IMAGES[:2], 0)


def test_proxy_prompts_name_earlier_images_of_the_path():
    first = {"p_t2i": "a red circle", "p_i2i": "", "i_ref": []}
    second = {"p_t2i": "a red circle and a star", "p_i2i": "add a star", "i_ref": [0]}
    found = PromptedTranslator(Scripted(first, second)).proxies(HISTORY)
    assert [proxy.i_ref for proxy in found] == [(), (0,)]
    for wrong in ({**second, "i_ref": [1]}, {**second, "p_i2i": ""}, {**second, "p_t2i": " "}):
        with pytest.raises(AnswerError):
            PromptedTranslator(Scripted(first, wrong, wrong)).proxies(HISTORY)


class Truthful:
    """A model that answers the templates as the exact roles of the shapes world do."""

    name = "truthful"

    def __init__(self, one):
        self.roles, self.history = make_shapes_roles(one), None

    def chat(self, question):
        text = question.messages[0]["content"][-1]["text"]
        if text.startswith("You make an image"):
            allowed = tuple(re.findall(r"^- (\w+):", text, re.MULTILINE))
            return ChatResponse(self.roles.planner.turn(self.history, "inspect", allowed, 0))
        if text.startswith("An image tool"):
            return ChatResponse(json.dumps({"questions": self.roles.verifier.checklist(self.history, None)}))
        if "Answer each of these questions" in text:
            questions = tuple(re.findall(r"^\d+\. (.*)$", text, re.MULTILINE))
            checks = self.roles.verifier.check(self.history, None, questions, question.images[-1])
            answers = [{"answer": "yes" if check.passed else "no", "evidence": check.evidence} for check in checks]
            return ChatResponse(json.dumps({"answers": answers}))
        if "Tell it again" in text:
            replies = self.roles.translator.replies(self.history, True)
            return ChatResponse(json.dumps({"texts": [strip_action(reply) for reply in replies]}))
        if "Write the next text" in text:
            return ChatResponse(json.dumps({"text": strip_action(self.roles.translator.verdict(self.history, ()))}))
        if "write two short texts" in text:
            proxy = self.roles.translator.proxies(self.history)[len(question.images) - 1]
            return ChatResponse(json.dumps({"p_t2i": proxy.p_t2i, "p_i2i": proxy.p_i2i, "i_ref": list(proxy.i_ref)}))
        found = self.roles.verifier.validate(self.history)
        return ChatResponse(
            json.dumps({"accepted": found.accepted, "gaps": list(found.gaps), "feedback": found.feedback})
        )


class Watching:
    """Passes the history of a call to the model of the role."""

    def __init__(self, role, model):
        self.role, self.model = role, model

    def __getattr__(self, name):
        def call(history, *arguments, **options):
            self.model.history = history
            return getattr(self.role, name)(history, *arguments, **options)

        return call


@pytest.mark.parametrize("wrong", [(), (1,), (1, 3, *range(4, 100))])
def test_a_truthful_model_gives_the_trajectory_of_the_exact_roles(wrong):
    """Runs without a mistake, with one that is corrected, and with mistakes until the trajectory is rejected."""
    one = item(1)
    model = Truthful(one)
    roles = (PromptedPlanner(model), PromptedVerifier(model), PromptedTranslator(model))
    outcome = synthesize(one, Roles(*(Watching(role, model) for role in roles)), MistakesAt(*wrong), seed=2)
    exact = synthesize(one, make_shapes_roles(one, judges=0), MistakesAt(*wrong), seed=2)
    assert (outcome.reason, outcome.detail) == (exact.reason, exact.detail)
    assert outcome.verification == exact.verification
    assert bool(outcome.verification) == bool(wrong)
    assert (outcome.record is None) == (exact.record is None) == (len(wrong) > 1)
    if outcome.record is None:
        return
    assert outcome.record.trajectory == exact.record.trajectory
    assert outcome.record.proxies == exact.record.proxies
    assert outcome.record.checklists == exact.record.checklists
