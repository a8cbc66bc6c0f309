import numpy as np

from clvr_jax.data.shapes import editing_example, generation_example, simulate_trajectory
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import detect
from clvr_jax.worlds.shapes.oracle import parse_edits
from clvr_jax.worlds.shapes.prompts import train_prompt
from clvr_jax.worlds.shapes.scene import HELD_OUT_PAIRS


def pairs(reading):
    return {item.cell: (item.color, item.shape) for item in reading.objects}


def test_a_generation_example_satisfies_its_prompt_without_held_out_pairs():
    for seed in range(200):
        example, metadata = generation_example(np.random.default_rng(seed)), train_prompt(np.random.default_rng(seed))
        reading = detect(example.target)
        assert example.text == metadata["prompt"]
        assert check(reading, metadata).correct, metadata
        assert not HELD_OUT_PAIRS & set(pairs(reading).values())


def test_an_editing_example_changes_only_what_its_text_requests():
    rng = np.random.default_rng(0)
    for _ in range(100):
        example = editing_example(rng)
        before, after = detect(example.references[0]), detect(example.target)
        edits = parse_edits(example.text)
        touched = {edit.cell for edit in edits}
        assert {c: p for c, p in pairs(before).items() if c not in touched} == {
            c: p for c, p in pairs(after).items() if c not in touched
        }, example.text
        for edit in edits:
            expected = (edit.object.color, edit.object.shape) if edit.object else None
            assert pairs(after).get(edit.cell) == expected, example.text


def test_the_last_image_of_a_terminated_trajectory_is_right():
    rng = np.random.default_rng(1)
    for _ in range(40):
        metadata = train_prompt(rng)
        trajectory = simulate_trajectory(rng, metadata)
        if trajectory.replies[-1].endswith("<|terminate|>"):
            assert check(detect(trajectory.canvases[-1]), metadata).correct, trajectory
        assert len(trajectory.replies) == len(trajectory.canvases) + 1


def test_an_example_is_conditioned_on_previous_steps_only():
    rng = np.random.default_rng(2)
    trajectory = next(t for t in (simulate_trajectory(rng) for _ in range(50)) if len(t.canvases) > 2)
    example = trajectory.example(2)
    assert len(example.references) == 2
    assert example.text.count("<IMG_GEN_") == 2
    assert example.text.startswith(trajectory.prompt)
    assert "<|image_gen|>" not in example.text
