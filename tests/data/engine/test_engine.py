"""Tests of synthesis with exact roles: kept trajectories, and discarded ones with their reasons."""

import json

import pytest

from clvr_jax.data.engine.actions import EndTrajectory, ImageEdit, read_turn, to_json
from clvr_jax.data.engine.engine import STAGES, Settings, synthesize
from clvr_jax.data.engine.roles.base import PromptItem, Roles, Validation
from clvr_jax.data.engine.roles.shapes import make_shapes_roles
from clvr_jax.data.engine.states import END, MACHINE, START, State, check_machine
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ImageResponse, ProviderError
from clvr_jax.interfaces.answers import AnswerError
from clvr_jax.reasoning.conversation.actions import strip_action
from clvr_jax.reasoning.conversation.context import conditioning_text
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.metadata import parse_metadata
from clvr_jax.worlds.shapes.oracle import apply_edits, parse_edits
from tests.data.engine.exact_generator import ExactGenerator, item


class OneShot(ExactGenerator):
    """Generates the final result in one shot."""

    def __init__(self, prompt, result):
        super().__init__()
        self.prompt, self.result = prompt, result

    def generate(self, task):
        return ImageResponse(self.result) if task.prompt == self.prompt else super().generate(task)


class Down(ExactGenerator):
    def generate(self, task):
        raise ProviderError("image tool: 429, tried 5 times", "limited")


def test_turns_round_trip():
    allowed = ("IMAGE_EDIT", "END_TRAJECTORY")
    turn = read_turn('Sure:\n```json\n{"perceive": "p", "reason": "r", "action": "END_TRAJECTORY"}\n```', allowed, 0)
    assert turn.action == EndTrajectory()
    data = {
        "perceive": "a",
        "reason": "b",
        "action": "IMAGE_EDIT",
        "parameters": {"prompt": "c", "ref_img_list": [2, 0]},
    }
    turn = read_turn(json.dumps(data), allowed, 3)
    assert turn.action == ImageEdit("c", (2, 0))
    assert to_json(turn) == data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "INITIAL_GENERATION"}, "one of IMAGE_EDIT"),
        ({"perceive": " "}, "perceive must be a text"),
        ({"parameters": {"prompt": "c", "ref_img_list": [3]}}, "0..2"),
        ({"parameters": {"prompt": "c", "ref_img_list": [1, 1]}}, "different pictures"),
        ({"parameters": {"prompt": "c", "ref_img_list": [True]}}, "list of picture numbers"),
        ({"parameters": {"prompt": "c", "ref_img_list": []}}, "not empty"),
        ({"parameters": {"prompt": "c" * 9000, "ref_img_list": [0]}}, "9000 characters"),
        ({"parameters": {"prompt": "c", "ref_img_list": [0], "size": 3}}, "got also size"),
        ({"parameters": "c"}, "must be an object"),
    ],
)
def test_errors_of_invalid_turns_name_the_cause(changes, message):
    data = {"perceive": "a", "reason": "b", "action": "IMAGE_EDIT", "parameters": {"prompt": "c", "ref_img_list": [0]}}
    with pytest.raises(AnswerError, match=message):
        read_turn(json.dumps({**data, **changes}), ("IMAGE_EDIT",), 3)


@pytest.mark.parametrize("text", ["", "I would rather paint a cat.", '{"perceive": "a", "reas', "[1, 2]"])
def test_replies_without_an_object_are_errors(text):
    with pytest.raises(AnswerError, match="JSON object"):
        read_turn(text, ("IMAGE_EDIT",), 3)


def test_the_state_machine_is_valid():
    check_machine(MACHINE)
    assert (START, END) == ("generate_base_image", "finalize")
    with pytest.raises(ClvrError, match="no state"):
        check_machine({START: State(START, {"INITIAL_GENERATION": "inspect"}), END: State(END, {})})
    alone = {START: State(START, {"INITIAL_GENERATION": START}), END: State(END, {})}
    with pytest.raises(ClvrError, match="cannot be reached: finalize"):
        check_machine(alone)


@pytest.mark.parametrize("number", range(4))
def test_an_exact_generator_gives_a_trajectory_that_is_right_at_each_step(number):
    one, generator = item(number), ExactGenerator()
    outcome = synthesize(one, make_shapes_roles(one), generator, seed=5)
    assert (outcome.stage, outcome.reason) == ("kept", "")
    record = outcome.record
    *steps, last = record.trajectory.steps
    assert record.id == one.id
    assert check(detect(last_image := steps[-1].image), parse_metadata(one.metadata)).correct
    assert last.image is None
    assert last_image is record.trajectory.image
    assert record.trajectory.nfe == 4 * len(steps)
    canvas = ()
    for step, proxy, checklist in zip(steps, record.proxies, record.checklists, strict=False):
        edits = parse_edits(step.reasoning)
        canvas = apply_edits(canvas, edits)
        seen = {(obj.color, obj.shape, obj.cell) for obj in detect(step.image).objects}
        assert seen == {(obj.color, obj.shape, obj.cell) for obj in canvas}
        assert all(f"{obj.color} {obj.shape} at the {obj.cell}" in proxy.p_t2i for obj in canvas)
        assert len(checklist) == 9
    assert [proxy.i_ref for proxy in record.proxies[:-1]] == [(), *((number,) for number in range(len(steps) - 1))]
    # The generator received the conditions of its training: the prompt, all replies, and all images of the path.
    text, references, _ = generator.calls[len(steps) - 1]
    assert text.startswith(one.prompt)
    assert text.endswith(strip_action(steps[-1].reasoning))
    assert references == len(steps) - 1


def test_a_generator_with_short_texts_receives_a_shortened_history():
    """Shortens to the last reply, which is all that the generator uses, so that the trajectory is the same."""
    one, generator = item(0), ExactGenerator()
    roles = make_shapes_roles(one, text=lambda prompt, replies: conditioning_text(prompt, replies, len(replies) - 1))
    steps = synthesize(one, roles, generator, seed=5).record.trajectory.generated
    assert steps == synthesize(one, make_shapes_roles(one), ExactGenerator(), seed=5).record.trajectory.generated
    assert len(steps) > 1
    for number, (text, references, _) in enumerate(generator.calls[: len(steps)]):
        replies = [step.reasoning for step in steps[: number + 1]]
        assert text == conditioning_text(one.prompt, replies, left_out=number)
        assert references == number


def test_one_wrong_image_discards_the_trajectory_and_without_verification_it_is_kept():
    wrong_without = 0
    for number in range(8):
        one = item(number)
        outcome = synthesize(
            one, make_shapes_roles(one), ExactGenerator(wrong=5), Settings(keep_mistakes=False), seed=1
        )
        assert (outcome.record, outcome.reason) == (None, "passive verification")
        assert " at the " in outcome.detail
        without = synthesize(
            one, make_shapes_roles(one, judges=0), ExactGenerator(wrong=5), Settings(verify=False), seed=1
        )
        if without.record:
            canvas = ()
            for step in without.record.trajectory.generated:
                canvas = apply_edits(canvas, parse_edits(step.reasoning))
                seen = {(obj.color, obj.shape, obj.cell) for obj in detect(step.image).objects}
                wrong_without += seen != {(obj.color, obj.shape, obj.cell) for obj in canvas}
                canvas = detect(step.image).objects
    assert wrong_without > 0


def test_a_trajectory_that_is_not_preferred_to_one_shot_is_discarded():
    one = item(0)
    done = synthesize(one, make_shapes_roles(one, judges=0), ExactGenerator(), seed=1)
    result = done.record.trajectory.image
    roles = make_shapes_roles(one)
    outcome = synthesize(one, roles, OneShot(one.prompt, result), seed=1)
    assert (outcome.record, outcome.stage, outcome.reason) == (None, "accepted", "consensus")
    assert STAGES.index("accepted") < STAGES.index("preferred")


class Confused:
    """Gives `times` replies that are no turns, then those of another planner."""

    def __init__(self, other, times):
        self.other, self.times, self.complaints = other, times, []

    def turn(self, history, state, allowed, seed):
        self.complaints += [event.error for event in history.events[-1:] if event.error]
        self.times -= 1
        return "Let me think." if self.times >= 0 else self.other.turn(history, state, allowed, seed)


def test_the_planner_gets_one_more_turn_with_the_error():
    one = item(1)
    roles = make_shapes_roles(one)
    once, twice = Confused(roles.planner, 1), Confused(roles.planner, 2)
    kept = synthesize(one, Roles(once, roles.verifier, roles.translator), ExactGenerator())
    assert kept.record
    assert ["no JSON object" in complaint for complaint in once.complaints] == [True]
    lost = synthesize(one, Roles(twice, roles.verifier, roles.translator), ExactGenerator())
    assert (lost.record, lost.stage, lost.reason) == (None, None, "invalid action")


class BackOnce:
    """Rolls back to the first image at its first validation."""

    def __init__(self, other):
        self.other, self.sent = other, False

    def __getattr__(self, name):
        return getattr(self.other, name)

    def validate(self, history):
        if not self.sent:
            self.sent = True
            return Validation(False, ("not as it should be",), "begin again", history.path[0])
        return self.other.validate(history)


def test_images_that_a_validation_rolls_back_are_not_in_the_trajectory():
    one = item(2)
    roles = make_shapes_roles(one)
    outcome = synthesize(
        one, Roles(roles.planner, BackOnce(roles.verifier), roles.translator), ExactGenerator(), Settings(max_images=16)
    )
    straight = synthesize(one, Roles(roles.planner, roles.verifier, roles.translator), ExactGenerator())
    assert len(outcome.history.images) > len(outcome.history.path)
    assert len(outcome.record.trajectory.steps) == len(straight.record.trajectory.steps)


def test_budgets_and_failures_of_providers_are_distinguished():
    one = item(3)
    roles = make_shapes_roles(one)
    assert synthesize(one, roles, ExactGenerator(), Settings(max_images=1)).reason == "budget"
    assert synthesize(one, roles, ExactGenerator(), Settings(max_turns=2)).reason == "budget"
    with pytest.raises(ProviderError, match="429, tried 5 times"):  # no outcome of the prompt
        synthesize(one, roles, Down())
    with pytest.raises(ClvrError):
        make_shapes_roles(PromptItem("x", "a cat", {"tag": "cat"}))


def test_the_outcome_of_a_prompt_does_not_depend_on_the_process():
    one, other = item(0), item(1)
    first, second = ExactGenerator(), ExactGenerator()
    synthesize(one, make_shapes_roles(one), first, seed=3)
    synthesize(other, make_shapes_roles(other), second, seed=3)
    again = ExactGenerator()
    synthesize(one, make_shapes_roles(one), again, seed=3)
    assert first.calls == again.calls
    assert {seed for *_, seed in first.calls}.isdisjoint(seed for *_, seed in second.calls)
