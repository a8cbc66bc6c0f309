"""Planning without looking, and the best of several drawings, in the shapes world with a drawer that forgets."""

from clvr_jax.evaluation.benchmarks.shapes import shapes_checker
from clvr_jax.evaluation.systems.models import Oracle, budget_for_mode
from clvr_jax.evaluation.systems.open_loop import OpenLoopController, request_whole_plan
from clvr_jax.reasoning import Budget, Conversation, run
from clvr_jax.worlds.shapes.oracle import first_reply, parse_edits, parse_plan
from clvr_jax.worlds.shapes.prompts import evaluation_prompts
from tests.evaluation.test_closed_loop_in_shapes import ClumsyDrawer
from tests.reasoning.scripted import generate

METADATA = evaluation_prompts("complex")[::20]


def trajectories(mode, budget=None):
    prompts = [entry["prompt"] for entry in METADATA]
    limits = budget_for_mode(mode, budget)
    return run(prompts, OpenLoopController(Oracle(METADATA)), ClumsyDrawer(), limits, range(len(prompts)))


def correct(done):
    return sum(shapes_checker().check(each.image, entry).correct for each, entry in zip(done, METADATA, strict=True))


def test_a_plan_of_the_shapes_world_is_drawn_as_a_whole():
    said = Oracle(METADATA).reply([Conversation(METADATA[-1]["prompt"])])[0]
    whole = request_whole_plan(said)
    assert len(parse_edits(said)) == 2
    assert [edit.object for edit in parse_edits(whole)] == list(parse_plan(said))
    assert request_whole_plan(whole) == whole
    assert request_whole_plan(generate("A cat on a mat.")) == generate("A cat on a mat.")
    unfinished = first_reply(parse_plan(said)).replace("<|image_gen|>", "")
    assert request_whole_plan(unfinished) == unfinished  # to be asked for again


def test_the_open_loop_draws_once_and_the_best_of_several_is_better():
    once, best = trajectories("open-loop"), trajectories("best-of", Budget(candidates=6))
    assert {len(each.generated) for each in once} == {1}
    assert {each.verdict for each in once} == {None}
    assert {len(each.generated) for each in best} == {6}
    for each in best:
        assert {step.references for step in each.generated} == {()}
        assert each.verdict.score == min(step.verdict.score for step in each.generated)
    assert correct(best) > correct(once) > 0
