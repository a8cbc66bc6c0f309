import time
from dataclasses import replace

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import Budget, Trajectory, run
from clvr_jax.reasoning.loop.events import Finished, Generated, Replied, RolledBack, Selected
from clvr_jax.reasoning.seeds import derive_seed
from tests.reasoning.scripted import (
    CountingDrawer,
    NoisyController,
    NoisyDrawer,
    ScriptedController,
    again,
    generate,
    picture,
    stop,
    value_of,
)


def run_one(replies, budget=None, seed=0, **options):
    controller, image_generator = ScriptedController({"p": replies}), CountingDrawer()
    (trajectory,) = run(["p"], controller, image_generator, budget, seed, **options)
    assert not controller.script["p"], "the loop did not ask for every reply"
    return trajectory, controller, image_generator


def scores(trajectory):
    return [step.verdict.score if step.verdict else None for step in trajectory.generated]


def test_accepts_what_has_nothing_unmet():
    trajectory, controller, image_generator = run_one([generate(), again(2), stop()])
    assert trajectory.outcome == "accepted"
    assert scores(trajectory) == [2, 0]
    assert (trajectory.best, value_of(trajectory.image)) == (1, 2)
    assert [step.references for step in trajectory.generated] == [(), (0,)]
    assert trajectory.nfe == 8
    assert trajectory.steps[-1].image is None
    assert [len(call[0].images) for call in controller.calls] == [0, 1, 2]
    assert image_generator.requests[1].text == "p\nDraw it.<IMG_GEN_1>\nI see it. Unmet: item 0; item 1. Mend it."
    assert [value_of(image) for image in image_generator.requests[1].images] == [1]


def test_stopping_with_something_unmet_is_no_accept():
    trajectory, _, _ = run_one([generate(), stop(unmet=1)])
    assert trajectory.outcome == "gave up"
    assert trajectory.verdict.unmet == ("item 0",)
    assert value_of(trajectory.image) == 1


def test_giving_up_on_a_worse_picture_returns_the_best():
    trajectory, _, _ = run_one([generate(), again(1), stop(unmet=3)])
    assert (trajectory.outcome, trajectory.best) == ("gave up", 0)


def test_stopping_before_any_picture_gives_none():
    trajectory, _, image_generator = run_one(["I cannot draw this.<|terminate|>"])
    assert (trajectory.outcome, trajectory.image, trajectory.best, trajectory.nfe) == ("gave up", None, None, 0)
    assert not image_generator.requests


def test_last_picture_of_a_spent_budget_is_judged():
    trajectory, controller, image_generator = run_one([generate(), again(2), again(1)], Budget(max_steps=2))
    assert trajectory.outcome == "step limit"
    assert scores(trajectory) == [2, 1]
    assert (trajectory.best, len(image_generator.requests), len(controller.calls)) == (1, 2, 3)


def test_last_picture_of_a_spent_budget_can_be_accepted():
    trajectory, _, _ = run_one([generate(), stop()], Budget(max_steps=1))
    assert trajectory.outcome == "accepted"


def test_worse_last_picture_is_not_the_result():
    trajectory, _, _ = run_one([generate(), again(1), again(2)], Budget(max_steps=2))
    assert (trajectory.outcome, trajectory.best) == ("step limit", 0)
    assert trajectory.steps[1].rolled_back


def test_nfe_budget_holds():
    trajectory, _, _ = run_one([generate(), again(2), again(1)], Budget(max_nfe=11))
    assert (trajectory.outcome, trajectory.nfe) == ("nfe limit", 8)


def test_time_budget_stops_drawing():
    class Slow(CountingDrawer):
        def generate(self, requests):
            time.sleep(0.05)
            return super().generate(requests)

    (trajectory,) = run(["p"], ScriptedController({"p": [generate(), again(1)]}), Slow(), Budget(max_seconds=0.04))
    assert (trajectory.outcome, len(trajectory.generated)) == ("time limit", 1)
    assert trajectory.seconds >= 0.05
    assert sum(step.seconds for step in trajectory.steps) == pytest.approx(trajectory.seconds)


def test_the_trajectory_says_how_many_replies_the_generator_did_not_read():
    class Forgetful(CountingDrawer):
        def generate(self, requests):
            drawn = zip(super().generate(requests), requests, strict=True)
            return [
                replace(generated_image, left_out=max(len(request.replies) - 2, 0))
                for generated_image, request in drawn
            ]

    script = [generate(), again(3), again(2), again(1), stop()]
    (trajectory,) = run(["p"], ScriptedController({"p": script}), Forgetful())
    assert [step.left_out for step in trajectory.steps] == [0, 0, 1, 2, 0]


def test_equal_pictures_the_latest_wins_and_nothing_rolls_back():
    trajectory, _, _ = run_one([generate(), again(1), again(1), stop(1)])
    assert trajectory.best == 2
    assert not any(step.rolled_back for step in trajectory.steps)


def test_worse_picture_is_rolled_back_and_its_reply_drawn_again():
    trajectory, controller, image_generator = run_one([generate(), again(1, "First try."), again(3, "Unused."), stop()])
    assert trajectory.outcome == "accepted"
    assert [step.rolled_back for step in trajectory.generated] == [False, True, False]
    assert [step.redraw for step in trajectory.generated] == [0, 0, 1]
    assert scores(trajectory) == [1, 3, 0]
    first, second = image_generator.requests[1:]
    assert first.text == second.text
    assert "First try." in second.text
    assert first.seed != second.seed
    assert [value_of(image) for image in second.images] == [1]
    # The next reply is asked for without the dropped picture.
    assert [value_of(image) for image in controller.calls[-1][0].images] == [1, 3]
    assert trajectory.steps[2].references == (0,)


def test_third_worse_picture_at_the_same_place_is_continued_from():
    replies = [generate(), again(1, "Try."), again(2), again(2), again(3, "Go on."), stop(0)]
    trajectory, controller, image_generator = run_one(replies)
    assert [step.rolled_back for step in trajectory.generated] == [False, True, True, False, False]
    assert [step.references for step in trajectory.generated] == [(), (0,), (0,), (0,), (0, 3)]
    assert "Go on." in image_generator.requests[-1].text
    assert (trajectory.outcome, trajectory.best) == ("accepted", 4)
    assert len(controller.calls[-1][0].images) == 3


def test_continued_worse_branch_still_returns_the_best():
    replies = [generate(), again(1), again(2), again(2), again(2), again(4), stop(5)]
    trajectory, _, _ = run_one(replies)
    assert (trajectory.outcome, trajectory.best, trajectory.verdict.score) == ("gave up", 0, 1)


def test_roll_back_can_be_switched_off():
    trajectory, _, _ = run_one([generate(), again(1), again(2), stop(0)], Budget(max_rollbacks=0))
    assert not any(step.rolled_back for step in trajectory.steps)
    assert trajectory.steps[2].references == (0, 1)


def test_unreadable_reply_is_asked_for_again():
    trajectory, controller, _ = run_one([generate(), "what?", "Unmet: nothing.", stop()])
    assert trajectory.outcome == "accepted"
    assert trajectory.steps[-1].attempts == 3
    conversations = [call[0] for call in controller.calls[1:]]
    assert [conversation.attempt for conversation in conversations] == [0, 1, 2]
    assert len({conversation.seed for conversation in conversations}) == 3


def test_unreadable_replies_end_with_the_best_picture():
    trajectory, _, _ = run_one([generate(), again(1), "?", "?", "I am happy.<|terminate|>"])
    assert trajectory.outcome == "unparseable"
    assert trajectory.best == 0  # judged, while the second picture never was
    assert trajectory.steps[1].verdict is None
    assert "Unmet" in trajectory.error


def test_unreadable_from_the_start_gives_no_picture():
    trajectory, _, _ = run_one(["?"], Budget(max_parse_retries=0))
    assert (trajectory.outcome, trajectory.image, trajectory.steps) == ("unparseable", None, ())


def test_only_picture_is_returned_although_nobody_judged_it():
    trajectory, _, _ = run_one([generate(), "?"], Budget(max_parse_retries=0))
    assert (trajectory.outcome, trajectory.best, trajectory.verdict) == ("unparseable", 0, None)


def test_attempts_are_counted_per_reply():
    trajectory, _, _ = run_one(["?", generate(), "?", again(1), "?", stop()], Budget(max_parse_retries=1))
    assert [step.attempts for step in trajectory.steps] == [2, 2, 2]


def test_the_best_of_several_candidates_goes_on():
    events = []
    replies = [generate(), again(2, "Two."), again(1, "One."), again(1, "Last."), stop(1), stop(0), again(3)]
    trajectory, controller, image_generator = run_one(replies, Budget(candidates=3), on_event=events.append)
    assert trajectory.outcome == "accepted"
    assert scores(trajectory) == [2, 1, 1, 1, 0, 3]
    assert [step.rolled_back for step in trajectory.generated] == [True, True, False, True, False, True]
    assert [step.redraw for step in trajectory.generated] == [0, 1, 2, 0, 1, 2]
    assert [step.references for step in trajectory.generated] == [()] * 3 + [(2,)] * 3
    assert [len(call) for call in image_generator.calls] == [3, 3]
    assert [[value_of(chat.images[-1]) for chat in call] for call in controller.calls[1:]] == [[1, 2, 3], [4, 5, 6]]
    assert "Last." in image_generator.requests[-1].text
    assert "One." not in image_generator.requests[-1].text
    assert len({request.seed for request in image_generator.requests}) == 6
    assert (trajectory.best, value_of(trajectory.image)) == (4, 5)
    assert [(event.number, event.among) for event in events if isinstance(event, Selected)] == [
        (2, (0, 1, 2)),
        (4, (3, 4, 5)),
    ]
    assert sum(step.seconds for step in trajectory.steps) == pytest.approx(trajectory.seconds)


def test_candidates_stay_within_the_limits():
    trajectory, _, image_generator = run_one(
        [generate(), again(2), again(1), again(1), again(1)], Budget(max_steps=4, candidates=3)
    )
    assert (trajectory.outcome, [len(call) for call in image_generator.calls]) == ("step limit", [3, 1])
    # The price of a drawing is known after the first.
    trajectory, _, image_generator = run_one([generate(), again(2), again(1)], Budget(max_nfe=11, candidates=3))
    assert (trajectory.outcome, trajectory.nfe, [len(call) for call in image_generator.calls]) == (
        "nfe limit",
        8,
        [1, 1],
    )


def test_a_candidate_whose_judgment_cannot_be_read_is_put_aside():
    replies = [generate(), "?", again(1, "Go on."), "?", stop(0), again(4)]
    trajectory, controller, _ = run_one(replies, Budget(max_steps=4, max_parse_retries=1, candidates=2))
    assert (trajectory.outcome, trajectory.best, trajectory.error) == ("accepted", 2, None)
    assert [step.rolled_back for step in trajectory.generated] == [True, False, False, True]
    assert scores(trajectory) == [None, 1, 0, 4]
    assert [len(call) for call in controller.calls] == [1, 2, 1, 2]

    trajectory, _, _ = run_one([generate(), "?", "?"], Budget(max_parse_retries=0, candidates=2))
    assert (trajectory.outcome, trajectory.best) == ("unparseable", 1)
    assert "no action token" in trajectory.error


def test_a_worse_best_candidate_is_rolled_back():
    replies = [generate(), again(4), again(1), again(2), again(3), stop(0), again(1)]
    trajectory, _, _ = run_one(replies, Budget(candidates=2))
    assert trajectory.outcome == "accepted"
    assert [step.rolled_back for step in trajectory.generated] == [True, False, True, True, False, True]
    assert [step.redraw for step in trajectory.generated] == [0, 1, 0, 1, 2, 3]
    assert [step.references for step in trajectory.generated] == [(), ()] + [(1,)] * 4


def test_stopping_when_verified_does_not_wait_for_the_controller():
    replies = [generate(), again(0, "Make it nicer.")]
    trajectory, _, image_generator = run_one(replies, Budget(stop_when="verified"))
    assert (trajectory.outcome, len(image_generator.requests)) == ("accepted", 1)
    trajectory, _, image_generator = run_one([*replies, stop()])
    assert len(image_generator.requests) == 2


def test_stopping_when_drawn_never_looks():
    trajectory, controller, image_generator = run_one([generate()], Budget(stop_when="drawn"))
    assert (trajectory.outcome, trajectory.best, trajectory.verdict) == ("step limit", 0, None)
    assert (len(controller.calls), len(image_generator.requests)) == (1, 1)
    trajectory, _, _ = run_one(["No.<|terminate|>"], Budget(stop_when="drawn"))
    assert (trajectory.outcome, trajectory.image) == ("gave up", None)


def without_times(trajectory):
    return replace(trajectory, seconds=0.0, steps=tuple(replace(step, seconds=0.0) for step in trajectory.steps))


@pytest.mark.parametrize(
    ("candidates", "outcomes"), [(1, {"accepted", "unparseable"}), (2, {"accepted", "nfe limit", "step limit"})]
)
def test_batch_gives_the_same_as_one_by_one(candidates, outcomes):
    prompts = [f"prompt {number}" for number in range(40)]
    seeds = list(range(100, 140))
    budget = Budget(max_steps=6, max_nfe=15, candidates=candidates)
    together = run(prompts, NoisyController(), NoisyDrawer(), budget, seeds)
    assert {trajectory.outcome for trajectory in together} >= outcomes
    assert any(step.rolled_back for trajectory in together for step in trajectory.steps)
    for prompt, seed, expected in zip(prompts, seeds, together, strict=True):
        (alone,) = run([prompt], NoisyController(), NoisyDrawer(), budget, [seed])
        assert without_times(alone) == without_times(expected)
        assert [value_of(step.image) for step in alone.generated] == [
            value_of(step.image) for step in expected.generated
        ]


def test_results_do_not_depend_on_the_place_in_the_batch():
    one, two = run(["same", "same"], NoisyController(), NoisyDrawer(), seeds=3)
    assert without_times(one) == without_times(two)


def test_result_is_never_worse_than_any_judged_picture():
    for trajectory in run([f"p{n}" for n in range(60)], NoisyController(), NoisyDrawer(), seeds=range(60)):
        judged = [step.verdict.score for step in trajectory.generated if step.verdict]
        if judged:
            assert trajectory.verdict.score == min(judged)
        assert len(trajectory.generated) <= 8
        assert (trajectory.outcome == "accepted") == (
            trajectory.steps[-1:] != () and trajectory.steps[-1].image is None
        )


def test_one_call_of_each_model_a_round_and_finished_prompts_leave():
    controller = ScriptedController(
        {"a": [generate(), stop()], "b": [generate(), again(1), stop()], "c": ["?", generate(), stop()]}
    )
    image_generator = CountingDrawer()
    trajectories = run(["a", "b", "c"], controller, image_generator)
    assert [trajectory.prompt for trajectory in trajectories] == ["a", "b", "c"]
    assert [trajectory.outcome for trajectory in trajectories] == ["accepted"] * 3
    assert [[item.prompt for item in call] for call in controller.calls] == [
        ["a", "b", "c"],
        ["a", "b", "c"],
        ["b", "c"],
    ]
    assert [[item.prompt for item in call] for call in image_generator.calls] == [["a", "b"], ["b", "c"]]


def test_events_tell_the_story():
    events = []
    run_one([generate(), again(1), "?", again(2), stop()], on_event=events.append)
    kinds = [Replied, Generated, Replied, Generated, Replied, Replied, RolledBack, Generated, Replied, Finished]
    assert [type(event) for event in events] == kinds
    assert events[4].error is not None
    assert (events[6].number, events[6].to) == (1, 0)
    assert events[-1].trajectory.outcome == "accepted"


def test_model_and_versions_are_recorded():
    trajectory, _, _ = run_one([generate(), stop()], model="toy", versions={"toy": "2"}, seed=7)
    assert (trajectory.model, trajectory.seed, trajectory.versions["toy"]) == ("toy", 7, "2")
    assert "numpy" in trajectory.versions


def test_wrong_calls_are_named():
    controller, image_generator = ScriptedController({}), CountingDrawer()
    with pytest.raises(ClvrError, match="list of texts"):
        run("p", controller, image_generator)
    with pytest.raises(ClvrError, match="2 prompts but 1 seeds"):
        run(["a", "b"], controller, image_generator, seeds=[1])
    assert run([], controller, image_generator) == []

    class Short(NoisyDrawer):
        def generate(self, requests):
            return super().generate(requests)[1:]

    with pytest.raises(ClvrError, match="image generator was asked for 1 results and returned 0"):
        run(["p"], ScriptedController({"p": [generate()]}), Short())


def test_derived_seeds_are_fixed_and_distinct():
    assert derive_seed(0, "draw", 0) == derive_seed(0, "draw", 0) == 39614865
    seeds = {derive_seed(seed, kind, step) for seed in range(50) for kind in ("draw", "reply") for step in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_loop_starts_from_the_users_own_images(tmp_path):
    given = [[picture(200), picture(201)], []]
    script = {"a": [generate("Plan."), again(1), stop()], "b": [generate(), stop()]}
    controller, image_generator = ScriptedController(script), CountingDrawer()
    mine, other = run(["a", "b"], controller, image_generator, images=given)
    requests = [request for request in image_generator.requests if request.prompt == "a"]
    assert [[value_of(image) for image in request.images] for request in requests] == [[200, 201], [200, 201, 1]]
    chats = [chat for call in controller.calls for chat in call if chat.prompt == "a"]
    assert [[value_of(image) for image in chat.images] for chat in chats] == [
        [200, 201],
        [200, 201, 1],
        [200, 201, 1, 3],
    ]
    assert {chat.num_given for chat in chats} == {2}
    assert (mine.outcome, [step.references for step in mine.generated]) == ("accepted", [(), (0,)])
    assert other.given_images == ()

    loaded = Trajectory.load(mine.save(tmp_path))
    assert [value_of(image) for image in loaded.given_images] == [200, 201]
    assert (tmp_path / "index.html").read_text().count("Given image ") == 2
    other.save(tmp_path)
    assert not list(tmp_path.glob("given_*"))
    with pytest.raises(ClvrError, match="2 prompts but images for 1"):
        run(["a", "b"], controller, image_generator, images=given[:1])
