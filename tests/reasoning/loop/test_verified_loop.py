"""The loop with a verifier beside the controller."""

from collections.abc import Sequence

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import Budget, run
from clvr_jax.reasoning.loop.events import PlanVerified, RolledBack, Verified
from clvr_jax.reasoning.verification.verification import Requirement, Verification
from tests.reasoning.scripted import CountingDrawer, ScriptedController, again, generate, stop, value_of

REQUIRED = ("one", "two", "three")


class ScriptedVerifier:
    """Gives images the scripted probabilities, one tuple for each image in turn, and keeps what it was shown."""

    name = "scripted"

    def __init__(self, images: Sequence[Sequence[float]], plans: Sequence[Sequence[float]] = (), required=REQUIRED):
        self.script, self.plans, self.required = list(images), list(plans), required
        self.seen: list[int] = []
        self.seen_plans: list[str] = []

    def derive(self, prompts):
        return [self.required] * len(prompts)

    def check(self, requirements, images):
        self.seen += [value_of(image) for image in images]
        return [self._verification(texts, self.script.pop(0)) for texts in requirements]

    def check_plans(self, requirements, plans):
        self.seen_plans += plans
        return [self._verification(texts, self.plans.pop(0) if self.plans else [1.0] * 3) for texts in requirements]

    def _verification(self, texts, probabilities):
        checked = [Requirement(text, p >= 0.5, p, "seen") for text, p in zip(texts, probabilities, strict=False)]
        return Verification(tuple(checked), "I see it.", "describe", self.name)


def run_one(replies, images, budget=None, plans=(), required=REQUIRED):
    controller, image_generator = ScriptedController({"p": replies}), CountingDrawer()
    verifier = ScriptedVerifier(images, plans, required)
    events = []
    (trajectory,) = run(
        ["p"], controller, image_generator, budget, 0, events.append, verification="separate", verifier=verifier
    )
    assert not controller.script["p"], "the loop did not ask for every reply"
    assert not verifier.script, "the loop did not show every image"
    return trajectory, controller, image_generator, verifier, events


def test_only_the_verifier_accepts():
    trajectory, controller, *_ = run_one([generate(), again(0)], [(1, 1, 0.2), (1, 0.9, 0.8)])
    assert trajectory.outcome == "accepted"
    assert [step.verification.accepted for step in trajectory.generated] == [False, True]
    assert trajectory.verification.probability == 0.8
    assert [step.verdict for step in trajectory.generated] == [None, None]
    assert len(controller.calls) == 2, "nothing is asked of the controller once an image is accepted"


def test_a_controller_that_finds_nothing_unmet_is_not_believed():
    trajectory, *_ = run_one([generate(), stop()], [(1, 1, 0.2)])
    assert trajectory.outcome == "gave up"
    assert trajectory.unmet == ("three",)


def test_the_report_stands_beside_the_latest_image_only():
    _, controller, *_ = run_one([generate(), again(1), again(1)], [(1, 0, 0), (1, 1, 0), (1, 1, 1)])
    first, second, third = (call[0] for call in controller.calls)
    assert first.report == ""
    assert second.report == "I see it. Unmet: two; three."
    assert third.messages()[-1]["content"][1] == {"type": "text", "text": "I see it. Unmet: three."}
    assert third.messages()[2]["content"] == [{"type": "image"}]


def test_the_controller_reads_what_will_be_verified():
    _, controller, *_ = run_one([generate(), again(1)], [(1, 0, 0), (1, 1, 1)])
    assert [call[0].requirements for call in controller.calls] == [REQUIRED, REQUIRED]
    assert controller.calls[1][0].messages()[0]["content"] == "p\nRequired: one; two; three."


def test_a_clearly_worse_image_is_rolled_back_without_asking_the_controller():
    trajectory, controller, image_generator, _, events = run_one(
        [generate(), again(1)], [(1, 1, 0), (0, 0, 0), (1, 1, 1)]
    )
    assert (trajectory.outcome, len(controller.calls)) == ("accepted", 2)
    assert [step.rolled_back for step in trajectory.generated] == [False, True, False]
    assert [event for event in events if isinstance(event, RolledBack)] == [RolledBack(0, 1, 0)]
    assert image_generator.requests[2].text == image_generator.requests[1].text


def test_a_slightly_less_certain_image_is_not_rolled_back():
    trajectory, *_ = run_one([generate(), again(1), again(1)], [(0.9, 0.9, 0), (0.8, 0.8, 0), (1, 1, 1)])
    assert not any(step.rolled_back for step in trajectory.steps)


def test_the_most_probable_candidate_is_kept():
    budget = Budget(max_steps=3, candidates=3)
    trajectory, *_ = run_one([generate()], [(1, 0.6, 0.1), (1, 0.9, 0.1), (1, 0.2, 0.1)], budget)
    assert (trajectory.outcome, trajectory.best, value_of(trajectory.image)) == ("step limit", 1, 2)


def test_a_spent_budget_ends_before_the_controller_is_asked():
    trajectory, controller, *_ = run_one([generate()], [(1, 0, 0)], Budget(max_steps=1))
    assert (trajectory.outcome, len(controller.calls)) == ("step limit", 1)


def test_plans_are_made_again_until_one_meets_all():
    plans = [generate(f"Plan: {name}; b.") for name in "xyz"]
    trajectory, controller, _, verifier, events = run_one(plans, [(1, 1, 1)], plans=[(1, 0, 0), (1, 1, 0), (1, 1, 1)])
    assert verifier.seen_plans == ["Plan: x; b.", "Plan: y; b.", "Plan: z; b."]
    assert trajectory.steps[0].reasoning == "Plan: z; b."
    assert [call[0].attempt for call in controller.calls] == [0, 1, 2]
    assert len({call[0].seed for call in controller.calls}) == 3
    assert [event.verification.accepted for event in events if isinstance(event, PlanVerified)] == [False, False, True]


def test_the_best_plan_is_carried_out_when_none_meets_all():
    plans = [generate(f"Plan: {name}.") for name in "xyz"]
    budget = Budget(max_plan_retries=2)
    trajectory, *_ = run_one(plans, [(1, 1, 1)], budget, plans=[(1, 0, 0), (1, 1, 0), (0, 0, 0)])
    assert trajectory.steps[0].reasoning == "Plan: y."


@pytest.mark.parametrize("plan_retries", [1, 4])
def test_replies_that_cannot_be_read_after_a_plan_end_in_the_best_plan(plan_retries):
    """Not in a run without end, and not in a run without an image."""
    plans = [generate("Plan: x."), *([generate("Plan: y.")] if plan_retries == 4 else [])]
    budget = Budget(max_plan_retries=plan_retries)
    replies = [*plans, *["hm"] * (plan_retries + 1 - len(plans))]
    trajectory, controller, *_ = run_one(replies, [(1, 1, 1)], budget, plans=[(1, 1, 0), (1, 0, 0)])
    assert (trajectory.outcome, trajectory.steps[0].reasoning) == ("accepted", "Plan: x.")
    assert len(controller.calls) == plan_retries + 1


def test_a_reply_that_cannot_be_read_does_not_keep_a_better_plan_from_being_found():
    replies = [generate("Plan: x."), *["hm"] * 3, generate("Plan: z.")]
    trajectory, *_ = run_one(replies, [(1, 1, 1)], Budget(max_plan_retries=4), plans=[(1, 1, 0), (1, 1, 1)])
    assert trajectory.steps[0].reasoning == "Plan: z."


def test_a_prompt_without_requirements_is_never_accepted():
    trajectory, *_ = run_one([generate(), stop()], [()], required=())
    assert trajectory.outcome == "unverified"
    assert trajectory.verification.accepted is None


def test_every_image_is_verified_alone():
    _, _, _, verifier, events = run_one([generate(), again(1)], [(1, 0, 0), (1, 1, 1)])
    assert verifier.seen == [1, 2]
    assert [event.number for event in events if isinstance(event, Verified)] == [0, 1]


def test_without_verification_the_controllers_stop_is_no_accept():
    controller, image_generator = ScriptedController({"p": [generate(), again(1), stop()]}), CountingDrawer()
    (trajectory,) = run(["p"], controller, image_generator, verification="none")
    assert (trajectory.outcome, trajectory.best) == ("unverified", 1)
    assert [step.unmet for step in trajectory.generated] == [None, None]


def test_candidates_need_somebody_who_looks():
    with pytest.raises(ClvrError, match="verification none cannot choose among 2 candidates"):
        run(["p"], ScriptedController({"p": []}), CountingDrawer(), Budget(candidates=2), verification="none")


def test_separate_verification_needs_a_verifier():
    with pytest.raises(ClvrError, match="without a verifier"):
        run(["p"], ScriptedController({"p": []}), CountingDrawer(), verification="separate")
    with pytest.raises(ClvrError, match="with a verifier"):
        run(["p"], ScriptedController({"p": []}), CountingDrawer(), verifier=ScriptedVerifier([]))


def test_a_batch_gives_what_single_prompts_give():
    images = {"a": [(1, 0, 0), (1, 1, 1)], "b": [(1, 1, 1)], "c": [(1, 1, 0), (0, 0, 0), (1, 1, 1)]}
    replies = {"a": [generate(), again(1)], "b": [generate()], "c": [generate(), again(1)]}

    class ByPrompt(ScriptedVerifier):
        def derive(self, prompts):
            return [(prompt,) * 3 for prompt in prompts]

        def check(self, requirements, images_shown):
            return [self._verification(REQUIRED, self.by_prompt[texts[0]].pop(0)) for texts in requirements]

    def outcomes(prompts):
        verifier = ByPrompt([])
        verifier.by_prompt = {name: list(found) for name, found in images.items()}
        controller = ScriptedController({name: list(said) for name, said in replies.items()})
        return run(prompts, controller, CountingDrawer(), verification="separate", verifier=verifier)

    together = outcomes(["a", "b", "c"])
    for alone, one in zip([outcomes([name])[0] for name in "abc"], together, strict=True):
        assert [step.seed for step in alone.steps] == [step.seed for step in one.steps]
        assert [step.rolled_back for step in alone.steps] == [step.rolled_back for step in one.steps]
        assert alone.outcome == one.outcome
