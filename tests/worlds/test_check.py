from typing import Any

import numpy as np
import pytest

from clvr_jax.worlds.shapes.check import check, relations
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading, detect
from clvr_jax.worlds.shapes.language.grammar import sample_metadata, scene_for
from clvr_jax.worlds.shapes.layout import counts, holds, plan
from clvr_jax.worlds.shapes.metadata import RELATIONS, TAGS
from clvr_jax.worlds.shapes.render import render
from clvr_jax.worlds.shapes.scene import CELLS, COLORS, SHAPES, Scene, SceneObject, cell_center, place


def reading(*names: str, unclear: tuple[str, ...] = ()) -> Reading:
    found = []
    for name in names:
        color, shape, cell = name.split(" ", 2)
        found.append(DetectedObject(color, shape, cell, *cell_center(cell), 8.0))
    return Reading(tuple(found), unclear)


def item(shape: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": shape, "count": count, **more}


def reasons(seen: Reading, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> tuple[str, ...]:
    verdict = check(seen, {"tag": "complex", "include": list(include), "exclude": list(exclude), "prompt": "p"})
    assert verdict.correct == (not verdict.reasons)
    return verdict.reasons


def test_class_count_and_color() -> None:
    seen = reading("red circle top left", "red circle top", "blue star center")
    assert reasons(seen, item("circle", 2)) == ()
    assert reasons(seen, item("circle")) == ()
    assert reasons(seen, item("circle", 3)) == ("two circles instead of three",)
    assert reasons(seen, item("circle", color="blue")) == ("missing: blue circle",)
    assert reasons(seen, item("cross", 2)) == ("missing: two crosses",)
    assert reasons(seen, item("star", 2, color="blue")) == ("one blue star instead of two",)
    assert reasons(reading(), item("star"), item("cross")) == ("missing: star", "missing: cross")


def test_exclude_counts_whatever_the_color() -> None:
    seen = reading("red circle top left", "blue circle top", "red circle left")
    assert reasons(seen, item("circle", 2, color="red"), exclude=(item("circle", 4),)) == ()
    assert reasons(seen, item("circle", 2, color="red"), exclude=(item("circle", 3),)) == (
        "three circles instead of at most two",
    )
    assert reasons(seen, item("circle"), exclude=(item("circle", 2), item("star", 1))) == (
        "three circles instead of at most one",
    )
    assert reasons(reading("red star top"), item("star"), exclude=(item("star", 2),)) == ()
    assert reasons(reading("red star top", "red cross left"), item("star"), exclude=(item("cross", 1),)) == (
        "one cross instead of none",
    )


def test_place() -> None:
    seen = reading("red circle top left", "blue circle top")
    assert reasons(seen, item("circle", color="blue", place="top")) == ()
    assert reasons(seen, item("circle", color="blue", place="left")) == ("blue circle not at the left",)


def test_relations_of_one_pair() -> None:
    seen = reading("red circle top", "blue square center")
    assert reasons(seen, item("square"), item("circle", position=["above", 0])) == ()
    assert reasons(seen, item("square", color="blue"), item("circle", color="red", position=["left of", 0])) == (
        "red circle not left of blue square",
    )


def test_any_assignment_is_accepted() -> None:
    seen = reading("red circle left", "red circle right", "blue square center", "blue square bottom right")
    assert reasons(seen, item("square"), item("circle", position=["above", 0])) == ()
    assert reasons(seen, item("square"), item("circle", position=["below", 0])) == ("circle not below square",)


def test_relations_of_groups_hold_for_every_pair() -> None:
    two = item("circle", 2, position=["above", 0])
    assert reasons(reading("red circle left", "red circle top left", "blue star bottom left"), item("star"), two) == ()
    assert reasons(reading("red circle bottom", "red circle top", "blue star center"), item("star"), two) == (
        "two circles not above star",
    )


def test_objects_are_not_used_twice() -> None:
    seen = reading("red circle left", "blue star center")
    assert reasons(seen, item("circle", color="red"), item("circle"))
    chain = (item("star"), item("circle", position=["left of", 0]), item("circle", position=["right of", 1]))
    assert reasons(seen, *chain)
    assert reasons(reading("red circle left", "red circle center", "blue star right"), *chain) == ()


def test_conflicts_that_no_single_item_shows_are_reported() -> None:
    seen = reading("red circle left", "red square center")
    assert reasons(seen, item("circle", color="red"), item("circle")) == (
        "the objects satisfy each request alone but not all together",
    )


def test_unclear_cells_are_ignored() -> None:
    assert reasons(reading("red circle left", unclear=("top",)), item("circle")) == ()
    assert reasons(reading(unclear=("top",)), item("circle")) == ("missing: circle",)


def test_geometry_follows_geneval() -> None:
    def circle_at(x: float, y: float) -> DetectedObject:
        return DetectedObject("red", "circle", "center", x, y, 8.0)

    assert relations(circle_at(10, 32), circle_at(32, 32)) == {"left of"}
    assert relations(circle_at(32, 50), circle_at(32, 32)) == {"below"}
    assert relations(circle_at(32, 35), circle_at(32, 32)) == frozenset()
    assert relations(circle_at(10.67, 10.67), circle_at(32, 32)) == {"left of", "above"}
    # 16 right and 27 up: (16 - 3.2) / 31.4 is not enough for "right of".
    assert relations(circle_at(48, 5), circle_at(32, 32)) == {"above"}
    assert relations(circle_at(32, 32), circle_at(32, 32)) == frozenset()


def test_relations_of_cells_hold_for_all_positions_in_the_cells() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        first, second = (CELLS[index] for index in rng.permutation(9)[:2])
        pair = [place("red", "circle", cell, rng) for cell in (first, second)]
        seen = [DetectedObject(o.color, o.shape, o.cell, o.x, o.y, o.radius) for o in pair]
        for relation in RELATIONS:
            assert not holds(relation, first, second) or relation in relations(*seen)


def test_relations_of_cells_agree_with_the_checker() -> None:
    rng = np.random.default_rng(1)
    agree = []
    for _ in range(3000):
        first, second = (CELLS[index] for index in rng.permutation(9)[:2])
        pair = [place("red", "circle", cell, rng) for cell in (first, second)]
        seen = relations(*(DetectedObject(o.color, o.shape, o.cell, o.x, o.y, o.radius) for o in pair))
        agree += [counts(relation, first, second) == (relation in seen) for relation in RELATIONS]
    assert np.mean(agree) > 0.998


@pytest.mark.parametrize("tag", TAGS)
def test_rendered_scenes_and_plans_satisfy_their_metadata(tag: str) -> None:
    rng = np.random.default_rng(12)
    for _ in range(60):
        metadata = sample_metadata(rng, tag, allow_held_out=True)
        canonical = Scene(tuple(place(o.color, o.shape, o.cell, rng) for o in plan(metadata)))
        for scene in (canonical, scene_for(metadata, rng)):
            assert check(detect(render(scene)), metadata).reasons == ()
            assert len(scene.objects) == sum(entry["count"] for entry in metadata["include"])


def test_any_change_of_a_complex_scene_is_detected() -> None:
    """Checks that a complex scene is wrong after removing an object or changing its color or shape."""
    rng = np.random.default_rng(13)
    for _ in range(60):
        metadata = sample_metadata(rng, "complex")
        scene = scene_for(metadata, rng)
        index = int(rng.integers(len(scene.objects)))
        old = scene.objects[index]
        rest = scene.objects[:index] + scene.objects[index + 1 :]
        color, shape = old.color, old.shape
        if rng.random() < 0.5:
            color = str(rng.choice([name for name in COLORS if name != old.color]))
        else:
            shape = str(rng.choice([name for name in SHAPES if name != old.shape]))
        changed = SceneObject(color, shape, old.cell, old.x, old.y, old.radius)
        for objects in (rest, (*rest, changed)):
            assert not check(detect(render(Scene(objects))), metadata).correct
