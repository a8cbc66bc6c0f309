import random
from dataclasses import replace

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.reasoning import Budget, run
from clvr_jax.reasoning.loop.prompt_state import PromptState
from clvr_jax.reasoning.loop.work import GenerationWork, ReplyWork, Roles, perform
from tests.reasoning.scripted import CountingDrawer, NoisyController, NoisyDrawer, ScriptedController, again, generate


def state_of(prompt="p", seed=0, budget=None, index=0):
    return PromptState(index, prompt, seed, budget or Budget(), lambda event: None, "controller")


def without_seconds(trajectory):
    steps = tuple(replace(step, seconds=0.0) for step in trajectory.steps)
    images = [None if step.image is None else step.image.tobytes() for step in trajectory.steps]
    return replace(trajectory, seconds=0.0, versions={}, steps=steps), images


def scheduled_at_random(prompts, roles, budget, rng):
    """Performs the works of prompts in batches of random size and order, as a server does by arrival."""
    states = [state_of(prompt, number, budget, number) for number, prompt in enumerate(prompts)]
    while ready := [(state, work) for state in states for work in state.next_work(0.0)]:
        first, kind = rng.choice([(state, type(work)) for state, work in ready])
        chosen = {id(first), *(id(state) for state in states if rng.random() < 0.5)}
        # All works of a state are performed before it is asked again.
        perform([entry for entry in ready if id(entry[0]) in chosen and isinstance(entry[1], kind)], roles)
    return [state.finished("", {}) for state in states]


@pytest.mark.parametrize("budget", [Budget(max_steps=6), Budget(max_steps=7, candidates=3, max_nfe=20)])
def test_any_schedule_gives_the_trajectories_of_the_lockstep(budget):
    prompts = [f"prompt {number}" for number in range(12)]
    roles = Roles(NoisyController(), NoisyDrawer())
    expected = run(prompts, roles.controller, roles.image_generator, budget, list(range(12)))
    for seed in range(3):
        found = scheduled_at_random(prompts, roles, budget, random.Random(seed))
        assert [without_seconds(each) for each in found] == [without_seconds(each) for each in expected]


def test_a_state_repeats_its_works_until_they_are_done():
    state, roles = state_of(), Roles(ScriptedController({"p": [generate(), again(2)]}), CountingDrawer())
    (work,) = state.next_work(0.0)
    assert isinstance(work, ReplyWork)
    assert state.next_work(0.0) == [work]
    perform([(state, work)], roles)
    (work,) = state.next_work(0.0)
    assert isinstance(work, GenerationWork)
    assert state.finished("", {}) is None


def test_a_stopped_prompt_keeps_its_best_image():
    state = state_of()
    roles = Roles(ScriptedController({"p": [generate(), again(1), again(3)]}), CountingDrawer())
    for _ in range(5):  # reply, image, reply, image, reply
        perform([(state, work) for work in state.next_work(0.0)], roles)
    state.stop("stopped")
    state.stop("canceled")  # after the end
    assert state.next_work(0.0) == []
    trajectory = state.finished("", {})
    assert (trajectory.outcome, trajectory.best, len(trajectory.generated)) == ("stopped", 0, 2)


def test_a_prompt_that_is_canceled_at_once_has_no_image():
    state = state_of()
    state.stop("canceled")
    assert (state.next_work(0.0), state.finished("", {}).image) == ([], None)


def test_a_failed_batch_changes_nothing_and_can_be_repeated():
    class Short(CountingDrawer):
        def generate(self, requests):
            return super().generate(requests)[:-1]

    states = [state_of(index=number) for number in range(2)]
    controller = ScriptedController({"p": [generate(), generate()]})
    perform([(state, work) for state in states for work in state.next_work(0.0)], Roles(controller, CountingDrawer()))
    batch = [(state, work) for state in states for work in state.next_work(0.0)]
    with pytest.raises(ClvrError, match="image generator was asked for 2 results and returned 1"):
        perform(batch, Roles(controller, Short()))
    assert [(state, work) for state in states for work in state.next_work(0.0)] == batch
