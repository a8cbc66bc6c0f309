import re

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading, detect
from clvr_jax.worlds.shapes.layout import PlannedObject, plan
from clvr_jax.worlds.shapes.oracle import (
    Edit,
    OracleController,
    apply_edits,
    compare,
    edit_text,
    edited_scene,
    edits,
    first_edits,
    first_reply,
    next_reply,
    parse_edits,
    parse_plan,
)
from clvr_jax.worlds.shapes.prompts import evaluation_prompts, train_prompt
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import CELLS, Scene, cell_center, place, sample_pair, sample_scene_random


def planned(name: str) -> PlannedObject:
    color, shape, cell = name.split(" ", 2)
    return PlannedObject(color, shape, cell)


def seen(*names: str, unclear: tuple[str, ...] = ()) -> Reading:
    items = [planned(name) for name in names]
    return Reading(tuple(DetectedObject(i.color, i.shape, i.cell, *cell_center(i.cell), 8.0) for i in items), unclear)


PLAN = tuple(map(planned, ("red circle top left", "blue square center", "green star bottom right")))


def test_first_reply_plans_all_objects_and_requests_two() -> None:
    assert first_reply(PLAN) == (
        "Plan: red circle top left; blue square center; green star bottom right. "
        "Draw a red circle at the top left and a blue square at the center.<|image_gen|>"
    )
    assert first_reply((planned("orange cross top"),)) == (
        "Plan: orange cross top. Draw an orange cross at the top.<|image_gen|>"
    )
    assert "Draw a red circle at the top left, a blue square at the center and a green star at the bottom right." in (
        first_reply(PLAN, limit=3)
    )
    rng = np.random.default_rng(0)
    assert {len(parse_edits(first_reply(PLAN, rng))) for _ in range(20)} == {1, 2}
    with pytest.raises(ClvrError, match="plan is empty"):
        first_reply(())


@pytest.mark.parametrize(
    ("reading", "reply"),
    [
        (
            seen("red circle top left", "blue square center"),
            "I see red circle top left; blue square center. Unmet: green star bottom right. "
            "Add a green star at the bottom right.<|image_gen|>",
        ),
        (
            seen("red circle top left", "blue cross center"),
            "I see red circle top left; blue cross center. Unmet: blue square center; green star bottom right. "
            "Replace the blue cross at the center with a blue square. "
            "Add a green star at the bottom right.<|image_gen|>",
        ),
        (
            seen("red circle top left", "yellow star left", "blue square center", "green star bottom right"),
            "I see red circle top left; yellow star left; blue square center; green star bottom right. "
            "Unmet: no yellow star left. Remove the yellow star at the left.<|image_gen|>",
        ),
        (
            seen("red circle top left", "blue square center", "green star bottom right", unclear=("right",)),
            "I see red circle top left; blue square center; something unclear right; green star bottom right. "
            "Unmet: nothing unclear right. Clear the right.<|image_gen|>",
        ),
        (
            seen("red circle top left", "blue square center", unclear=("bottom right",)),
            "I see red circle top left; blue square center; something unclear bottom right. "
            "Unmet: green star bottom right. "
            "Replace the unclear thing at the bottom right with a green star.<|image_gen|>",
        ),
        (
            seen(),
            "I see nothing. Unmet: red circle top left; blue square center; green star bottom right. "
            "Add a red circle at the top left. Add a blue square at the center.<|image_gen|>",
        ),
        (
            seen("red circle top left", "blue square center", "green star bottom right"),
            "I see red circle top left; blue square center; green star bottom right. Unmet: nothing.<|terminate|>",
        ),
    ],
)
def test_next_reply(reading: Reading, reply: str) -> None:
    assert next_reply(PLAN, reading) == reply


def test_compare_classifies_all_cells() -> None:
    difference = compare(PLAN, seen("red circle top left", "blue cross center", "red star top", unclear=("left",)))
    assert difference.met == PLAN[:1]
    assert difference.wrong == ((PLAN[1], planned("blue cross center")),)
    assert difference.missing == PLAN[2:]
    assert difference.extra == (planned("red star top"),)
    assert difference.unclear == ("left",)
    assert [edit.kind for edit in difference.edits] == ["replace", "add", "remove", "clear"]
    assert len(difference.unmet) == 4


def test_plans_and_edits_round_trip_as_text() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        things = random_plan(rng)
        assert parse_plan(first_reply(things)) == things
        assert parse_edits(first_reply(things)) == first_edits(things)
        reading = random_reading(rng)
        assert parse_edits(next_reply(things, reading)) == edits(things, reading)
        assert parse_edits(next_reply(things, reading, limit=9)) == edits(things, reading, limit=9)


def random_plan(rng: np.random.Generator) -> tuple[PlannedObject, ...]:
    cells = rng.permutation(9)[: rng.integers(1, 7)]
    return tuple(PlannedObject(*sample_pair(rng, True), CELLS[cell]) for cell in cells)


def random_reading(rng: np.random.Generator) -> Reading:
    scene = sample_scene_random(rng, int(rng.integers(0, 7)))
    names = [
        f"{item.color} {item.shape} {item.cell}" for item in sorted(scene.objects, key=lambda o: CELLS.index(o.cell))
    ]
    free = [cell for cell in CELLS if cell not in {item.cell for item in scene.objects}]
    return seen(*names, unclear=tuple(cell for cell in free if rng.random() < 0.2))


def test_applying_all_edits_meets_the_plan() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        things, reading = random_plan(rng), random_reading(rng)
        difference = compare(things, reading)
        assert len(difference.unmet) == len(difference.edits)
        after = apply_edits(reading, difference.edits)
        assert set(after) == set(things)
        assert [CELLS.index(item.cell) for item in after] == sorted(CELLS.index(item.cell) for item in after)
        step = apply_edits(reading, edits(things, reading))
        assert len(compare(things, seen(*map(str, step))).unmet) <= max(len(difference.unmet) - 2, 0)


def test_edited_scenes_keep_other_objects_bit_for_bit() -> None:
    rng = np.random.default_rng(3)
    scene = Scene(tuple(place(*name, rng) for name in (("red", "circle", "top"), ("blue", "star", "left"))))
    changes = (
        Edit("replace", "left", planned("blue star left"), planned("black cross left")),
        Edit("add", "right", object=planned("cyan circle right")),
    )
    after = {item.cell: item for item in edited_scene(scene, changes, rng).objects}
    assert after["top"] == scene.objects[0]
    old, new = scene.objects[1], after["left"]
    assert (new.color, new.shape) == ("black", "cross")
    assert (new.x, new.y, new.radius) == (old.x, old.y, old.radius)
    assert set(after) == {"top", "left", "right"}
    gone = (Edit("remove", "top", target=planned("red circle top")), Edit("clear", "left"))
    assert edited_scene(scene, gone, rng) == Scene()


def test_invalid_edits_are_errors() -> None:
    with pytest.raises(ClvrError, match="unknown kind 'move'"):
        Edit("move", "top")
    with pytest.raises(ClvrError, match="is invalid"):
        Edit("add", "top")
    with pytest.raises(ClvrError, match="is invalid"):
        Edit("remove", "top")
    with pytest.raises(ClvrError, match="add at top, but"):
        Edit("add", "top", object=planned("red star left"))
    with pytest.raises(ClvrError, match="only edits of kind draw"):
        edit_text((Edit("clear", "top"),), first=True)
    with pytest.raises(ClvrError, match="needs first=True"):
        edit_text(first_edits(PLAN))
    with pytest.raises(ClvrError, match="must be at least 1, got 0"):
        edits(PLAN, seen(), limit=0)


def test_replies_without_a_valid_plan_are_errors() -> None:
    with pytest.raises(ClvrError, match="no sentence 'Plan"):
        parse_plan("Draw a red circle.<|image_gen|>")
    with pytest.raises(ClvrError, match="'red circle' is not"):
        parse_plan("Plan: red circle. Draw a red circle.<|image_gen|>")
    with pytest.raises(ClvrError, match="uses a cell twice"):
        parse_plan("Plan: red circle top; blue star top.")


def test_errors_of_the_controller_name_what_is_missing() -> None:
    controller = OracleController({})
    with pytest.raises(ClvrError, match="no metadata for the prompt 'x'"):
        controller.reply("x", [], [])
    with pytest.raises(ClvrError, match="no image to verify"):
        controller.reply("x", [first_reply(PLAN)], [])


def run_loop(
    controller: OracleController, prompt: str, rng: np.random.Generator, slip: float = 0.0, most: int = 8
) -> tuple[list[str], list[np.ndarray]]:
    """Runs the loop with an image generator that makes a mistake with probability `slip` and is exact otherwise."""
    replies: list[str] = []
    images: list[np.ndarray] = []
    scene = Scene()
    while len(replies) < most:
        replies.append(controller.reply(prompt, replies, images))
        if replies[-1].endswith("<|terminate|>"):
            break
        changes = [mistaken(edit, rng) if rng.random() < slip else edit for edit in parse_edits(replies[-1])]
        scene = edited_scene(scene, changes, rng)
        images.append(render(scene))
    return replies, images


def mistaken(edit: Edit, rng: np.random.Generator) -> Edit:
    cell = CELLS[int(rng.integers(9))]
    return Edit("add", cell, object=PlannedObject(*sample_pair(rng), cell))


@pytest.mark.slow
def test_the_loop_with_an_exact_generator_satisfies_the_evaluation_prompts() -> None:
    everything = evaluation_prompts("eval") + evaluation_prompts("complex") + evaluation_prompts("dense")[::5]
    controller = OracleController({metadata["prompt"]: metadata for metadata in everything})
    rng = np.random.default_rng(4)
    for metadata in everything:
        replies, images = run_loop(controller, metadata["prompt"], rng)
        assert replies[-1].endswith("Unmet: nothing.<|terminate|>"), metadata["prompt"]
        assert check(detect(images[-1]), metadata).reasons == (), metadata["prompt"]
        objects = sum(item["count"] for item in metadata["include"])
        assert len(images) == (objects + 1) // 2
        assert all(len(re.findall(r"<\|\w+\|>", reply)) == 1 for reply in replies)


def test_random_plans_satisfy_the_checker() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        metadata = train_prompt(rng)
        scene = edited_scene(Scene(), first_edits(plan(metadata, rng), limit=9), rng)
        assert check(detect(render(scene)), metadata).correct


def test_the_oracle_corrects_the_mistakes_of_an_image_generator() -> None:
    rng = np.random.default_rng(6)
    metadata_set = [train_prompt(rng) for _ in range(100)]
    controller = OracleController({metadata["prompt"]: metadata for metadata in metadata_set})
    for metadata in metadata_set:
        replies, images = run_loop(controller, metadata["prompt"], rng, slip=0.25, most=40)
        assert replies[-1].endswith("Unmet: nothing.<|terminate|>")
        assert check(detect(images[-1]), metadata).correct
