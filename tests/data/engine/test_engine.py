"""From a prompt to a verified trajectory: what is kept, what is discarded and why, with exact roles."""

import json

import pytest

from clvr_jax.data.engine.actions import EndTrajectory, ImageEdit, read_turn, to_json
from clvr_jax.data.engine.engine import STAGES, Settings, synthesize
from clvr_jax.data.engine.roles import PromptItem, Roles, Validation
from clvr_jax.data.engine.shapes_roles import make_shapes_roles
from clvr_jax.data.engine.states import END, MACHINE, START, State, check_machine
from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import ImageResponse, ProviderError
from clvr_jax.reasoning.actions import strip_action
from clvr_jax.reasoning.answers import AnswerError
from clvr_jax.reasoning.context import conditioning_text
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.metadata import parse_metadata
from clvr_jax.worlds.shapes.oracle import apply_edits, parse_edits
from tests.data.engine.painter import Painter, item


class OneShot(Painter):
    """As good in one shot as with many."""

    def __init__(self, prompt, result):
        super().__init__()
        self.prompt, self.result = prompt, result

    def generate(self, task):
        return ImageResponse(self.result) if task.prompt == self.prompt else super().generate(task)


class Down(Painter):
    def generate(self, task):
        raise ProviderError("image tool: 429, tried 5 times", "limited")


def test_a_turn_is_read_as_it_was_written():
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
    ("changes", "said"),
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
def test_what_is_wrong_with_a_turn_is_said_in_words(changes, said):
    data = {"perceive": "a", "reason": "b", "action": "IMAGE_EDIT", "parameters": {"prompt": "c", "ref_img_list": [0]}}
    with pytest.raises(AnswerError, match=said):
        read_turn(json.dumps({**data, **changes}), ("IMAGE_EDIT",), 3)


@pytest.mark.parametrize("text", ["", "I would rather paint a cat.", '{"perceive": "a", "reas', "[1, 2]"])
def test_answers_without_an_object_are_refused(text):
    with pytest.raises(AnswerError, match="JSON object"):
        read_turn(text, ("IMAGE_EDIT",), 3)


def test_the_machine_leads_from_its_start_to_its_end():
    check_machine(MACHINE)
    assert (START, END) == ("generate_base_image", "finalize")
    with pytest.raises(ClvrError, match="no state"):
        check_machine({START: State(START, {"INITIAL_GENERATION": "inspect"}), END: State(END, {})})
    alone = {START: State(START, {"INITIAL_GENERATION": START}), END: State(END, {})}
    with pytest.raises(ClvrError, match="cannot be reached: finalize"):
        check_machine(alone)


@pytest.mark.parametrize("number", range(4))
def test_a_drawer_that_never_errs_gives_a_trajectory_that_is_right_at_every_step(number):
    one, painter = item(number), Painter()
    outcome = synthesize(one, make_shapes_roles(one), painter, seed=5)
    assert (outcome.stage, outcome.reason) == ("kept", "")
    record = outcome.record
    *drawn, last = record.trajectory.steps
    assert record.id == one.id
    assert check(detect(last_picture := drawn[-1].image), parse_metadata(one.metadata)).correct
    assert last.image is None
    assert last_picture is record.trajectory.image
    assert record.trajectory.nfe == 4 * len(drawn)
    canvas = ()
    for step, proxy, checklist in zip(drawn, record.proxies, record.checklists, strict=False):
        edits = parse_edits(step.reasoning)
        canvas = apply_edits(canvas, edits)
        seen = {(thing.color, thing.shape, thing.cell) for thing in detect(step.image).objects}
        assert seen == {(thing.color, thing.shape, thing.cell) for thing in canvas}
        assert all(f"{thing.color} {thing.shape} at the {thing.cell}" in proxy.p_t2i for thing in canvas)
        assert len(checklist) == 9
    assert [proxy.i_ref for proxy in record.proxies[:-1]] == [(), *((number,) for number in range(len(drawn) - 1))]
    # The drawing model got what it is trained on: the prompt and every reply, and all pictures of the path.
    text, references, _ = painter.calls[len(drawn) - 1]
    assert text.startswith(one.prompt)
    assert text.endswith(strip_action(drawn[-1].reasoning))
    assert references == len(drawn) - 1


def test_a_generator_that_reads_little_is_given_the_history_as_it_fits():
    """Here the last reply alone, which is all that the painter looks at: the trajectory is the same."""
    one, painter = item(0), Painter()
    roles = make_shapes_roles(one, text=lambda prompt, replies: conditioning_text(prompt, replies, len(replies) - 1))
    drawn = synthesize(one, roles, painter, seed=5).record.trajectory.generated
    assert drawn == synthesize(one, make_shapes_roles(one), Painter(), seed=5).record.trajectory.generated
    assert len(drawn) > 1
    for number, (text, references, _) in enumerate(painter.calls[: len(drawn)]):
        replies = [step.reasoning for step in drawn[: number + 1]]
        assert text == conditioning_text(one.prompt, replies, left_out=number)
        assert references == number


def test_one_wrong_picture_discards_the_trajectory_and_without_verification_it_is_kept():
    wrong_without = 0
    for number in range(8):
        one = item(number)
        outcome = synthesize(one, make_shapes_roles(one), Painter(wrong=5), Settings(keep_mistakes=False), seed=1)
        assert (outcome.record, outcome.reason) == (None, "passive verification")
        assert " at the " in outcome.detail
        without = synthesize(one, make_shapes_roles(one, judges=0), Painter(wrong=5), Settings(verify=False), seed=1)
        if without.record:
            canvas = ()
            for step in without.record.trajectory.generated:
                canvas = apply_edits(canvas, parse_edits(step.reasoning))
                seen = {(thing.color, thing.shape, thing.cell) for thing in detect(step.image).objects}
                wrong_without += seen != {(thing.color, thing.shape, thing.cell) for thing in canvas}
                canvas = detect(step.image).objects
    assert wrong_without > 0


def test_what_one_shot_draws_as_well_is_no_reason_for_a_trajectory():
    one = item(0)
    done = synthesize(one, make_shapes_roles(one, judges=0), Painter(), seed=1)
    result = done.record.trajectory.image
    roles = make_shapes_roles(one)
    outcome = synthesize(one, roles, OneShot(one.prompt, result), seed=1)
    assert (outcome.record, outcome.stage, outcome.reason) == (None, "accepted", "consensus")
    assert STAGES.index("accepted") < STAGES.index("preferred")


class Confused:
    """Says something that is no turn `times` times, then what another director says."""

    def __init__(self, other, times):
        self.other, self.times, self.complaints = other, times, []

    def turn(self, history, state, allowed, seed):
        self.complaints += [event.error for event in history.events[-1:] if event.error]
        self.times -= 1
        return "Let me think." if self.times >= 0 else self.other.turn(history, state, allowed, seed)


def test_a_director_gets_one_more_turn_and_hears_what_was_wrong():
    one = item(1)
    roles = make_shapes_roles(one)
    once, twice = Confused(roles.planner, 1), Confused(roles.planner, 2)
    kept = synthesize(one, Roles(once, roles.verifier, roles.translator), Painter())
    assert kept.record
    assert ["no JSON object" in complaint for complaint in once.complaints] == [True]
    lost = synthesize(one, Roles(twice, roles.verifier, roles.translator), Painter())
    assert (lost.record, lost.stage, lost.reason) == (None, None, "invalid action")


class BackOnce:
    """Sends the director back to the first picture at its first validation."""

    def __init__(self, other):
        self.other, self.sent = other, False

    def __getattr__(self, name):
        return getattr(self.other, name)

    def validate(self, history):
        if not self.sent:
            self.sent = True
            return Validation(False, ("not as it should be",), "begin again", history.path[0])
        return self.other.validate(history)


def test_a_validation_may_lead_back_and_what_was_drawn_in_between_is_not_told():
    one = item(2)
    roles = make_shapes_roles(one)
    outcome = synthesize(
        one, Roles(roles.planner, BackOnce(roles.verifier), roles.translator), Painter(), Settings(max_images=16)
    )
    straight = synthesize(one, Roles(roles.planner, roles.verifier, roles.translator), Painter())
    assert len(outcome.history.images) > len(outcome.history.path)
    assert len(outcome.record.trajectory.steps) == len(straight.record.trajectory.steps)


def test_budgets_and_providers_that_fail_are_told_apart():
    one = item(3)
    roles = make_shapes_roles(one)
    assert synthesize(one, roles, Painter(), Settings(max_images=1)).reason == "budget"
    assert synthesize(one, roles, Painter(), Settings(max_turns=2)).reason == "budget"
    with pytest.raises(ProviderError, match="429, tried 5 times"):  # no outcome of the prompt
        synthesize(one, roles, Down())
    with pytest.raises(ClvrError):
        make_shapes_roles(PromptItem("x", "a cat", {"tag": "cat"}))


def test_a_prompt_gives_the_same_wherever_it_is_worked_on():
    one, other = item(0), item(1)
    first, second = Painter(), Painter()
    synthesize(one, make_shapes_roles(one), first, seed=3)
    synthesize(other, make_shapes_roles(other), second, seed=3)
    again = Painter()
    synthesize(one, make_shapes_roles(one), again, seed=3)
    assert first.calls == again.calls
    assert {seed for *_, seed in first.calls}.isdisjoint(seed for *_, seed in second.calls)
