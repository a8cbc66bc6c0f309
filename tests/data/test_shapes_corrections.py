"""Tests of training examples under an image generator's own images."""

import dataclasses

import chex
import numpy as np
import pytest
from flax import nnx

from clvr_jax.configs import shapes_distill, shapes_sft
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.data.shapes import Canvas
from clvr_jax.data.shapes_corrections import requested_image, rollout_examples
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import SHIPPED
from clvr_jax.reasoning.conversation.context import conditioning_text
from clvr_jax.tasks.shapes.sft import LATE_STEPS, rollout_kinds
from clvr_jax.training.objectives.distillation import DistillConfig
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.layout import PlannedObject
from clvr_jax.worlds.shapes.oracle import Edit, compare, parse_edits
from clvr_jax.worlds.shapes.scene import Scene, place
from tests.data.test_shapes_proxies import simulated

TOKENIZER = SHIPPED / "shapes-tiny" / "tokenizer"


def image_with(objects, smudges=()):
    """Renders objects "red star top left", and unclear cells."""
    rng = np.random.default_rng(0)
    scene = Scene(tuple(place(*each.split(" ", 2), rng) for each in objects))
    return Canvas(scene, tuple(smudges), seed=3).render()


def shown(image):
    return {str(PlannedObject(each.color, each.shape, each.cell)) for each in detect(image).objects}


def test_a_requested_image_has_the_edits_and_leaves_clear_objects_where_they_are():
    before = image_with(["red star top left", "blue circle center"], ["bottom"])
    green = PlannedObject("green", "square", "bottom")
    image = requested_image(before, [Edit("replace", "bottom", None, green)], np.random.default_rng(1))
    assert shown(image) == {"red star top left", "blue circle center", "green square bottom"}
    assert not detect(image).unclear
    for old, new in zip(detect(before).objects, detect(image).objects, strict=False):
        assert np.hypot(old.x - new.x, old.y - new.y) < 0.5


def test_an_unclear_cell_that_no_edit_names_keeps_its_pixels():
    before = image_with(["red star top left"], ["bottom right"])
    assert detect(before).unclear == ("bottom right",)
    added = Edit("add", "top", object=PlannedObject("black", "cross", "top"))
    image = requested_image(before, [added], np.random.default_rng(1))
    assert shown(image) == {"red star top left", "black cross top"}
    np.testing.assert_array_equal(image[44:, 44:], before[44:, 44:])


def test_the_first_image_shows_what_is_requested_and_nothing_else():
    edits = parse_edits("Draw a red star at the top left and a blue circle at the center.")
    image = requested_image(None, edits, np.random.default_rng(0))
    assert shown(image) == {"red star top left", "blue circle center"}


def test_mistakes_are_references_and_every_target_is_as_requested():
    tokenizer, mistakes = load_tokenizer(TOKENIZER), 0
    for seed in range(6):
        record, _ = simulated(seed)
        steps = record.trajectory.steps
        examples = rollout_examples([record], tokenizer, 1024)
        assert len(examples) == len(steps)
        for at, example in enumerate(examples):
            np.testing.assert_array_equal(example.references, [step.image for step in steps[:at]])
            assert example.text == conditioning_text(record.trajectory.prompt, [s.reasoning for s in steps[: at + 1]])
            wanted = {str(edit.object) for edit in parse_edits(steps[at].reasoning) if edit.object is not None}
            assert wanted <= shown(example.target)
            mistakes += not wanted <= shown(steps[at].image)
    assert mistakes > 5


def test_steps_that_were_rolled_back_are_neither_references_nor_targets():
    record, _ = simulated(3, error_rate=0.0)
    steps = list(record.trajectory.steps)
    steps[1] = dataclasses.replace(steps[1], rolled_back=True)
    trajectory = dataclasses.replace(record.trajectory, steps=tuple(steps))
    examples = rollout_examples([dataclasses.replace(record, trajectory=trajectory)], load_tokenizer(TOKENIZER), 1024)
    assert len(examples) == len(steps) - 1
    np.testing.assert_array_equal(examples[1].references, [steps[0].image])


def test_a_history_that_is_too_long_loses_its_oldest_replies():
    record, _ = simulated(5)
    tokenizer = load_tokenizer(TOKENIZER)
    longest = rollout_examples([record], tokenizer, 1024)[-1].text
    shorter = rollout_examples([record], tokenizer, 300)[-1].text
    assert len(shorter) < len(longest)
    assert shorter.endswith(longest.rsplit("\n", 1)[1])
    assert shorter.startswith(record.trajectory.prompt)


def test_kinds_mix_examples_of_rollouts_and_simulated_ones_at_the_given_share():
    record, _ = simulated(1)
    examples = rollout_examples([record], load_tokenizer(TOKENIZER), 1024)
    texts = {example.text for example in examples}
    rng = np.random.default_rng(0)
    kinds = rollout_kinds(examples, 0.5)[1:]
    assert [kind.share for kind in kinds] == [share for share, _ in LATE_STEPS]
    sampled = [kinds[1].example(rng).text in texts for _ in range(60)]
    assert 15 <= sum(sampled) <= 45  # 30 expected, standard deviation 4
    for step, kind in enumerate(kinds[:6]):
        assert len(kind.example(rng).references) == step
    assert not {kind.example(rng).text for kind in rollout_kinds(examples, 0.0)[1:4]} & texts


def test_edits_of_the_plan_lead_from_an_unclear_image_to_the_plan():
    planned = [PlannedObject("red", "star", "top left"), PlannedObject("blue", "circle", "center")]
    image = image_with(["red star top left"], ["center"])
    edits = compare(planned, detect(image)).edits
    assert shown(requested_image(image, edits, np.random.default_rng(0))) == {str(each) for each in planned}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": TOKENIZER, "rollouts": TOKENIZER}, "give one of them"),
        ({"rollout_share": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_sources_that_exclude_each_other_and_shares_beyond_one_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        shapes_sft.task(dataclasses.replace(shapes_sft.CONFIG, base="shapes-tiny-sft", **changes))


def test_a_directory_without_trajectories_is_an_error(tmp_path):
    with pytest.raises(ClvrError, match="no saved trajectories"):
        shapes_sft.task(dataclasses.replace(shapes_sft.CONFIG, base="shapes-tiny-sft", rollouts=tmp_path))


def test_a_student_of_the_distillation_starts_from_its_own_weights_under_histories_of_rollouts(tmp_path):
    record, _ = simulated(1)
    record.trajectory.save(tmp_path / "00000")
    config = dataclasses.replace(
        shapes_distill.CONFIG,
        model="shapes-tiny",
        student="shapes-tiny-sft",
        reference_cache="loop",
        distill=DistillConfig(substeps=1, guidance=1.0),
        rollouts=tmp_path,
    )
    task = shapes_distill.task(config)
    student = nnx.state(Flux2Pipeline.from_pretrained("shapes-tiny-sft").transformer)
    chex.assert_trees_all_equal(task.params, student)
    assert max(task.batches(step)["references"].shape[1] for step in range(12)) > 3, "the recipe alone has three"


def test_images_of_another_size_and_replies_without_edits_are_errors():
    record, _ = simulated(2)
    tokenizer = load_tokenizer(TOKENIZER)

    def changed(**changes):
        steps = tuple(dataclasses.replace(step, **changes) for step in record.trajectory.steps)
        return dataclasses.replace(record, trajectory=dataclasses.replace(record.trajectory, steps=steps))

    with pytest.raises(ClvrError, match="trajectory 2: an image of 32 x 16 pixels, not of 64 x 64"):
        rollout_examples([changed(image=np.zeros((16, 32, 3), np.uint8))], tokenizer, 1024)
    with pytest.raises(ClvrError, match="request no edit of the shapes world"):
        rollout_examples([changed(reasoning="A sunset.")], tokenizer, 1024)
