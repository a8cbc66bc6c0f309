"""Loops that their user changes while they run, and loops that branch off from others."""

import json
import random

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import Budget, Trajectory
from clvr_jax.reasoning.loop.editable import EditablePromptState, branch_off
from clvr_jax.reasoning.loop.events import Edited, RolledBack
from clvr_jax.reasoning.loop.work import GenerationWork, PlanWork, ReplyWork, Roles, VerificationWork, perform
from clvr_jax.reasoning.trajectories.edits import Edit, EditError, Parent
from tests.reasoning.loop.test_verified_loop import ScriptedVerifier
from tests.reasoning.scripted import CountingDrawer, NoisyDrawer, ScriptedController, again, generate, value_of

ALL, TWO, ONE = (1, 1, 1), (1, 1, 0), (1, 0, 0)


class Loop:
    """A loop that is performed work by work. seen: the images that were verified."""

    def __init__(self, replies, images, budget=None, branch=None, prompt="p", plans=()):
        self.controller, self.generator = ScriptedController({prompt: replies}), CountingDrawer()
        self.verifier, self.events = ScriptedVerifier(images, plans), []
        self.state = EditablePromptState(0, prompt, 0, budget or Budget(), self.events.append, branch=branch)

    def until(self, kind):
        """Performs works until one of this kind is next; returns it."""
        while True:
            works = self.state.next_work(0.0)
            if not works or isinstance(works[0], kind):
                return works[0] if works else None
            perform([(self.state, works[0])], Roles(self.controller, self.generator, self.verifier))

    def to_end(self) -> Trajectory:
        self.until(())
        return self.state.finished("m", {})


def test_an_instruction_takes_the_place_of_the_next_reply():
    loop = Loop([generate("Plan: one; two; three. Draw.")], [ONE, ALL])
    loop.until(ReplyWork)
    perform([(loop.state, work) for work in loop.state.next_work(0)], Roles(loop.controller, loop.generator))
    loop.until(ReplyWork)  # to the first image
    loop.state.edit_plan(instruction=" Add a cat. ")
    trajectory = loop.to_end()
    assert [step.reasoning for step in trajectory.steps][1] == "Add a cat."
    assert (trajectory.steps[1].attempts, trajectory.steps[1].references) == (0, (0,))
    assert loop.generator.requests[1].replies[-1] == "Add a cat.<|image_gen|>"
    assert trajectory.edits == (Edit(1, instruction="Add a cat."),)
    assert trajectory.outcome == "accepted"
    assert [event.edit for event in loop.events if isinstance(event, Edited)] == list(trajectory.edits)


def test_an_instruction_replaces_a_plan_or_a_reply_that_is_not_carried_out_yet():
    loop = Loop([generate("Plan: one. Draw."), again(1, "Mend two.")], [ONE, TWO, ALL], plans=[ALL])
    assert isinstance(loop.until(PlanWork), PlanWork)
    loop.state.edit_plan(instruction="Draw a dog.")
    assert loop.until(GenerationWork).request.replies == ("Draw a dog.<|image_gen|>",)
    loop.until(VerificationWork)
    loop.until(GenerationWork)  # of the controller's reply
    loop.state.edit_plan(instruction="Mend three.")
    assert loop.until(GenerationWork).request.replies[-1] == "Mend three.<|image_gen|>"


def test_an_image_is_not_accepted_while_an_instruction_waits():
    loop = Loop([generate()], [ALL, TWO, ALL])
    loop.until(VerificationWork)
    loop.state.edit_plan(instruction="Make it larger.")
    trajectory = loop.to_end()
    assert (trajectory.outcome, len(trajectory.generated), trajectory.best) == ("accepted", 2, 0)


def test_new_requirements_are_checked_of_all_images():
    loop = Loop([generate(), again(1), again(1)], [ONE, TWO, (0.2,), (0.9,)])
    loop.until(ReplyWork)
    loop.until(GenerationWork)
    for _ in range(2):
        loop.until(VerificationWork)
        perform([(loop.state, work) for work in loop.state.next_work(0)], Roles(None, None, loop.verifier))
    loop.state.edit_plan(requirements=["a red circle."])
    assert loop.state.required == ("a red circle",)
    trajectory = loop.to_end()
    assert loop.verifier.seen == [1, 2, 1, 2]
    assert [step.unmet for step in trajectory.generated] == [("a red circle",), ()]
    assert (trajectory.outcome, trajectory.best) == ("accepted", 1)


def test_before_the_first_image_new_requirements_lead_to_a_new_plan():
    loop = Loop([generate("Old."), generate("New.")], [ALL], plans=[])
    assert loop.until(GenerationWork).request.replies == ("Old.<|image_gen|>",)
    loop.state.edit_plan(requirements=["x", "y"])
    assert loop.until(GenerationWork).request.replies == ("New.<|image_gen|>",)
    assert loop.controller.calls[-1][0].requirements == ("x", "y")
    early = Loop([generate()], [ALL])
    early.state.edit_plan(requirements=["x"])  # before any were derived
    assert early.until(ReplyWork).conversation.requirements == ("x",)


def test_a_rollback_drops_better_images_too():
    loop = Loop([generate(), again(2), again(2, "Another.")], [ONE, TWO, (1, 0.1, 0)], Budget(max_steps=3))
    loop.until(GenerationWork)
    loop.until(VerificationWork)
    while len(loop.state.steps) < 2 or loop.state.steps[1].verification is None:
        perform(
            [(loop.state, work) for work in loop.state.next_work(0)],
            Roles(loop.controller, loop.generator, loop.verifier),
        )
    loop.state.roll_back_to(0)
    assert loop.state.best == 0
    reply = loop.until(ReplyWork)
    assert (reply.number, reply.conversation.attempt > 0) == (0, True)
    trajectory = loop.to_end()
    assert [step.rolled_back for step in trajectory.steps] == [False, True, False]
    assert trajectory.steps[2].references == (0,)
    assert (trajectory.outcome, trajectory.best) == ("step limit", 2)  # not 1, which has the best score
    assert trajectory.edits == (Edit(2, rollback_to=0, dropped=(1,)),)
    assert [(event.number, event.to) for event in loop.events if isinstance(event, RolledBack)] == [(1, 0)]


def test_a_rollback_may_return_to_a_dropped_image_after_new_requirements():
    loop = Loop([generate(), again(2), again(2)], [TWO, ONE, (0.1,), (0.2,), (0.9,)], Budget(max_rollbacks=1))
    loop.until(ReplyWork)
    while not any(isinstance(event, RolledBack) for event in loop.events):
        perform(
            [(loop.state, work) for work in loop.state.next_work(0)],
            Roles(loop.controller, loop.generator, loop.verifier),
        )
        loop.state.next_work(0)
    assert loop.state.steps[1].rolled_back
    loop.state.edit_plan(requirements=["x"])
    loop.state.roll_back_to(1)
    assert loop.until(ReplyWork).number == 1
    assert [step.rolled_back for step in loop.state.steps] == [False, False]
    trajectory = loop.to_end()
    assert (trajectory.outcome, trajectory.steps[-1].references) == ("accepted", (0, 1))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.edit_plan(), "give requirements, an instruction, or both"),
        (lambda state: state.edit_plan(requirements=[]), "give from 1 to 64"),
        (lambda state: state.edit_plan(requirements=["a; b"]), "number 1 must be one line"),
        (lambda state: state.edit_plan(requirements=["a", "b\nc"]), "number 2 must be one line"),
        (lambda state: state.edit_plan(requirements=["None"]), "number 1 must be one line"),
        (lambda state: state.edit_plan(instruction=" "), "has no words"),
        (lambda state: state.edit_plan(["x"], "Stop.<|terminate|>"), "has the token <|terminate|>"),
        (lambda state: state.roll_back_to(1), "step 1 is no image of this loop; there are: 0"),
        (lambda state: state.roll_back_to(-1), "no image"),
    ],
)
def test_an_edit_that_cannot_be_carried_out_changes_nothing(edit, message):
    loop = Loop([generate(), again(1)], [ONE, ALL])
    loop.until(GenerationWork)
    loop.until(ReplyWork)
    before = loop.state.next_work(0)
    with pytest.raises(EditError, match=message):
        edit(loop.state)
    assert loop.state.next_work(0) == before
    trajectory = loop.to_end()
    assert (trajectory.outcome, trajectory.edits) == ("accepted", ())
    with pytest.raises(EditError, match="has ended"):
        loop.state.roll_back_to(0)
    with pytest.raises(EditError, match="has ended"):
        loop.state.edit_plan(["x"])


def parent_trajectory():
    return Loop([generate("Draw."), again(1, "Mend."), again(1, "More.")], [ONE, TWO, ALL]).to_end()


def test_a_branch_continues_from_an_image():
    parent = parent_trajectory()
    branch = branch_off("loop_a", parent.steps, 1, instruction="Add a cat.")
    loop = Loop([], [ALL], Budget(max_steps=1), branch)
    trajectory = loop.to_end()
    (request,) = loop.generator.requests
    assert [reply.removesuffix("<|image_gen|>") for reply in request.replies] == [
        parent.steps[0].reasoning,
        parent.steps[1].reasoning,
        "Add a cat.",
    ]
    assert [value_of(image) for image in request.images] == [1, 2]
    assert trajectory.parent == Parent("loop_a", 1, 2)
    assert (trajectory.best, trajectory.outcome, len(trajectory.steps)) == (2, "accepted", 3)


def test_a_branch_with_another_prompt_verifies_the_images_again():
    branch = branch_off("loop_a", parent_trajectory().steps, 1, has_new_prompt=True)
    loop = Loop([again(1)], [ONE, ONE, ALL], branch=branch, prompt="q")
    trajectory = loop.to_end()
    assert loop.verifier.seen == [1, 2, 1]
    assert trajectory.prompt == "q"
    assert [step.references for step in trajectory.steps] == [(), (0,), (0, 1)]
    assert trajectory.best == 2


def test_a_branch_needs_an_image_and_something_to_do():
    steps = parent_trajectory().steps
    with pytest.raises(EditError, match="step 9 is no image"):
        branch_off("loop_a", steps, 9)
    with pytest.raises(EditError, match="meets all requirements; give a prompt or an instruction"):
        branch_off("loop_a", steps, 2)
    with pytest.raises(EditError, match="no words"):
        branch_off("loop_a", steps, 1, instruction="")
    assert branch_off("loop_a", steps, 2, instruction="More.").steps[2].verification.accepted


def test_a_saved_trajectory_keeps_edits_and_parent(tmp_path):
    branch = branch_off("loop_a", parent_trajectory().steps, 1, instruction="Add a cat.")
    loop = Loop([again(1), again(1)], [TWO, (0.1,), (0.2,), (0.3,), (0.4,)], Budget(max_steps=2), branch)
    loop.until(ReplyWork)
    loop.state.edit_plan(requirements=["x"])
    loop.until(ReplyWork)
    loop.state.roll_back_to(1)
    trajectory = loop.to_end()
    trajectory.save(tmp_path / "saved")
    loaded = Trajectory.load(tmp_path / "saved")
    assert (loaded.edits, loaded.parent, loaded.best) == (trajectory.edits, trajectory.parent, trajectory.best)
    assert len(loaded.edits) == 3
    for field, value in [("edits", [{"step": -1}]), ("edits", "x"), ("parent", {"id": "loop_a"}), ("parent", 3)]:
        path = tmp_path / "saved" / "trajectory.json"
        content = trajectory.to_dict() | {field: value}
        path.write_text(json.dumps(content))
        with pytest.raises(ClvrError, match=r"trajectory\.json"):
            Trajectory.load(tmp_path / "saved")


class EvenVerifier(ScriptedVerifier):
    """Accepts few images, by their value."""

    def __init__(self):
        super().__init__([])

    def check(self, requirements, images):
        self.seen += [value_of(image) for image in images]
        return [
            self._verification(texts, [float(value_of(image) % 7 > each) for each in range(len(texts))])
            for texts, image in zip(requirements, images, strict=True)
        ]


class EverWillingController:
    def reply(self, conversations):
        return [again(1) if conversation.images else generate() for conversation in conversations]


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_edits_gives_a_trajectory_that_is_whole(seed, tmp_path):
    rng = random.Random(seed)
    roles = Roles(EverWillingController(), NoisyDrawer(), EvenVerifier())
    budget = Budget(max_steps=8, candidates=rng.choice([1, 2]))
    state = EditablePromptState(0, "p", seed, budget, lambda event: None)
    while works := state.next_work(0.0):
        perform([(state, work) for work in works[: rng.randint(1, len(works))]], roles)
        if rng.random() < 0.3 and not state.finished("", {}):
            edits = [
                lambda: state.edit_plan(requirements=[f"r{n}" for n in range(rng.randint(1, 5))]),
                lambda: state.edit_plan(instruction="Do it."),
                lambda: state.roll_back_to(rng.randrange(max(1, len(state.steps)))),
            ]
            try:
                rng.choice(edits)()
            except EditError:
                assert not state.steps
    trajectory = state.finished("m", {})
    dropped = {number for edit in trajectory.edits[-1:] for number in edit.dropped}
    assert trajectory.best is not None
    assert trajectory.best not in dropped
    assert len(trajectory.generated) <= 8
    assert all(step.verification is not None for step in trajectory.generated)
    trajectory.save(tmp_path / "saved")
    assert Trajectory.load(tmp_path / "saved").edits == trajectory.edits
    for number, step in enumerate(trajectory.steps):
        if step.image is not None and not step.verification.accepted:
            branch = branch_off("loop_a", trajectory.steps, number)
            other = EditablePromptState(0, "p", 1, Budget(max_steps=2), lambda event: None, branch=branch)
            while works := other.next_work(0.0):
                perform([(other, work) for work in works], roles)
            assert other.finished("m", {}).parent.step == number
