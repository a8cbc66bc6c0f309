import itertools
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.check import check
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading
from clvr_jax.worlds.shapes.language.grammar import words
from clvr_jax.worlds.shapes.language.second_grammar import NUM_STYLES, second_phrase
from clvr_jax.worlds.shapes.layout import plan
from clvr_jax.worlds.shapes.metadata import canonical_key, has_held_out_pair, parse_metadata
from clvr_jax.worlds.shapes.prompts import evaluation_prompts, train_prompt
from clvr_jax.worlds.shapes.scene import cell_center

SECOND = evaluation_prompts("second")
TREE = [
    {"class": "cross", "count": 1, "color": "blue"},
    {"class": "triangle", "count": 1, "color": "green", "position": ["left of", 0]},
    {"class": "star", "count": 2, "color": "red", "position": ["above", 1]},
    {"class": "circle", "count": 1, "color": "red", "place": "top left"},
]
FAN = [
    {"class": "square", "count": 1, "color": "orange", "place": "center"},
    {"class": "star", "count": 1, "color": "orange", "position": ["right of", 0]},
    {"class": "star", "count": 1, "color": "black", "position": ["below", 0]},
    {"class": "circle", "count": 3, "color": "cyan"},
]
WORDED = [
    (
        TREE,
        0,
        0,
        (
            "This image shows a blue cross. On the left side of the blue cross sits a green triangle. Above the "
            "green triangle stand two red stars. In the upper left corner stands a red circle."
        ),
    ),
    (
        FAN,
        0,
        1,
        (
            "Right in the middle appears an orange square. To the right of the orange square stands an orange "
            "star. Under the orange square appears a black star. Somewhere in the image are three cyan circles."
        ),
    ),
    (
        TREE,
        1,
        1,
        (
            "a blue cross with a green triangle on its left; two red stars above the green triangle; a red circle "
            "at the upper left."
        ),
    ),
    (
        FAN,
        1,
        2,
        (
            "Scene: an orange square in the very middle, with an orange star on its right side; a black star "
            "beneath the orange square; 3 cyan circles"
        ),
    ),
    (
        TREE,
        2,
        2,
        (
            "The image contains a blue cross, a green triangle, 2 red stars and a red circle. The blue cross is "
            "on the right side of the green triangle, while the green triangle is beneath the 2 red stars. The "
            "red circle is at the upper left."
        ),
    ),
    (
        FAN,
        2,
        3,
        (
            "Here we have an orange square, an orange star, a black star and 3 cyan circles. The orange square is "
            "in the very middle, and it is to the left of the orange star. The orange square is above the black "
            "star."
        ),
    ),
    (
        TREE,
        3,
        3,
        (
            "Objects: 1 blue cross, 1 green triangle, 2 red stars, 1 red circle. Layout: green triangle to the "
            "left of the blue cross; red stars above the green triangle; red circle in the upper left corner."
        ),
    ),
    (
        FAN,
        3,
        4,
        (
            "contents: one orange square, one orange star, one black star, three cyan circles. arrangement: "
            "orange square right in the middle; orange star right of the orange square; black star under the "
            "orange square."
        ),
    ),
    (
        TREE,
        4,
        4,
        (
            "Start with a blue cross. Then add a green triangle on the left of the blue cross. Next, add two red "
            "stars above the green triangle. Finally, add a red circle at the upper left."
        ),
    ),
    (
        TREE,
        5,
        5,
        (
            "A blue cross has been drawn. A green triangle has been put on the left of the blue cross. Two red "
            "stars have been positioned above the green triangle. A red circle has been put in the top-left "
            "corner."
        ),
    ),
    (
        FAN,
        6,
        7,
        (
            "a square that is orange lies right in the middle, while a star that is orange appears on the right "
            "of the orange square; furthermore, a star that is black stands below the orange square, and there "
            "are three circles that are cyan."
        ),
    ),
    (
        TREE,
        7,
        7,
        (
            "This scene has a blue cross, a green triangle and two red stars, together with a red circle. The "
            "triangle can be found on the left of the cross. The two stars can be found above the triangle. The "
            "circle can be found at the upper left."
        ),
    ),
    (
        FAN,
        8,
        9,
        (
            "An orange square occupies the exact center. The orange square has an orange star on its right side. "
            "The orange square also has a black star below it. There are also three cyan circles."
        ),
    ),
    (
        FAN,
        9,
        10,
        (
            "Please produce an image showing an orange square, an orange star, a black star and three cyan "
            "circles. Make sure that the orange square is in the exact center, that the orange star is right of "
            "the orange square, and that the orange square is above the black star."
        ),
    ),
    (
        TREE,
        10,
        10,
        (
            "a canvas on which a green triangle sits to the left of a blue cross, two red stars appear above the "
            "green triangle, and a red circle appears in the top-left corner."
        ),
    ),
    (
        TREE,
        11,
        11,
        (
            "In total there are 5 shapes: a cross that is blue, a triangle that is green, 2 stars that are red "
            "and a circle that is red. Left of the blue cross is the green triangle. Above the green triangle are "
            "the 2 red stars. In the top-left corner is the red circle."
        ),
    ),
    (
        FAN,
        12,
        13,
        (
            "image: one orange square (exact center) + one orange star (on the right of the orange square) + one "
            "black star (below the orange square) + three cyan circles"
        ),
    ),
    (
        FAN,
        13,
        14,
        (
            "The very middle is filled by an orange square. The region to the right of the orange square holds an "
            "orange star. The space under the orange square contains a black star. The image also includes three "
            "cyan circles."
        ),
    ),
]
RELATION = re.compile(
    r"\b(?:(?:left|right) (?:side )?of|(?:its|their) (?:left|right)|above|below|beneath|underneath|under)\b"
)
PLACE = re.compile(
    r"\bcorner|\bedge|(?:upper|lower|exact) center|at the (?:upper|lower) (?:left|right)|very middle|right in the"
    r" middle|(?:midway down|middle of) the (?:left|right) side"
)


def tier(objects: int) -> list[dict[str, Any]]:
    return [metadata for metadata in SECOND if metadata["tier"] == objects]


@pytest.mark.parametrize(("include", "style", "seed", "text"), WORDED)
def test_wording(include: list[dict[str, Any]], style: int, seed: int, text: str) -> None:
    metadata = {"tag": "complex", "include": include}
    assert second_phrase(metadata, np.random.default_rng(seed), style) == (text, style)


def test_the_table_has_every_style() -> None:
    assert {style for _, style, _, _ in WORDED} == set(range(NUM_STYLES))
    assert NUM_STYLES >= 8


def test_styles_are_sampled_by_default() -> None:
    rng = np.random.default_rng(0)
    sampled = Counter(second_phrase({"tag": "complex", "include": TREE}, rng)[1] for _ in range(700))
    assert set(sampled) == set(range(NUM_STYLES))
    assert min(sampled.values()) > 20


def test_every_prompt_names_all_items_relations_and_places() -> None:
    for metadata in SECOND:
        prompt, include = metadata["prompt"].lower(), metadata["include"]
        for item in include:
            shape = item["class"] + ("s" if item["count"] > 1 else "")
            shape = shape.replace("crosss", "crosses")
            after = rf"{shape} (?:in|that is|that are) {item['color']}"
            assert re.search(rf"\b(?:{item['color']} {shape}|{after})\b", prompt), prompt
            if item["count"] > 1:
                number = rf"(?:{item['count']}|{['two', 'three'][item['count'] - 2]})"
                assert re.search(rf"\b{number} (?:{item['color']} {shape}|{after})\b", prompt), prompt
        assert len(RELATION.findall(prompt)) == sum("position" in item for item in include), prompt
        assert len(PLACE.findall(prompt)) == sum("place" in item for item in include), prompt


def test_the_set_has_its_tiers_styles_and_held_out_pairs() -> None:
    assert Counter(metadata["tier"] for metadata in SECOND) == dict.fromkeys((3, 4, 5, 6), 75)
    for metadata in SECOND:
        assert metadata["tag"] == "complex"
        assert parse_metadata(metadata) == metadata
        assert sum(item["count"] for item in metadata["include"]) == metadata["tier"]
    for objects in (3, 4, 5, 6):
        assert {metadata["phrasing"] for metadata in tier(objects)} == set(range(NUM_STYLES))
        held_out = [metadata for metadata in tier(objects) if has_held_out_pair(metadata)]
        assert len(held_out) == 25
        assert {metadata["phrasing"] for metadata in held_out} == set(range(NUM_STYLES))


def test_many_prompts_are_hard() -> None:
    def share(chosen: list[dict[str, Any]], key: str) -> float:
        repeats = [len({item[key] for item in metadata["include"]}) < len(metadata["include"]) for metadata in chosen]
        return sum(repeats) / len(repeats)

    for objects in (3, 4, 5, 6):
        assert min(share(tier(objects), "color"), share(tier(objects), "class")) > 0.5
    for metadata_set in (tier(5), tier(6)):
        relations = [sum("position" in item for item in metadata["include"]) for metadata in metadata_set]
        assert sum(number >= 3 for number in relations) >= len(relations) / 3
    groups = [any(item["count"] > 1 for item in metadata["include"]) for metadata in SECOND]
    assert sum(groups) >= 60


def test_every_prompt_can_be_satisfied() -> None:
    for metadata in SECOND:
        objects = plan(metadata)
        assert len(objects) == metadata["tier"]
        seen = [
            DetectedObject(item.color, item.shape, item.cell, *cell_center(item.cell), 8.0)
            for item in sorted(objects, key=lambda item: cell_center(item.cell)[::-1])
        ]
        assert check(Reading(tuple(seen)), metadata).correct


def test_no_other_prompt_has_its_text_or_its_request() -> None:
    texts = [" ".join(words(metadata["prompt"])) for metadata in SECOND]
    requests = [canonical_key(metadata) for metadata in SECOND]
    assert len(set(texts)) == len(set(requests)) == len(SECOND)
    others = [metadata for name in ("eval", "complex", "dense") for metadata in evaluation_prompts(name)]
    rng = np.random.default_rng(0)
    trained = [train_prompt(rng, {"complex": 1.0}) for _ in range(3000)]
    for metadata in itertools.chain(others, trained):
        assert " ".join(words(metadata["prompt"])) not in texts
        assert canonical_key(metadata) not in requests


def test_metadata_that_it_cannot_express_are_errors() -> None:
    rng = np.random.default_rng(0)

    def say(include: list[dict[str, Any]], tag: str = "complex", style: int | None = None) -> None:
        second_phrase({"tag": tag, "include": include}, rng, style)

    with pytest.raises(ClvrError, match="got position and 5"):
        say(TREE, "position")
    with pytest.raises(ClvrError, match="got complex and 2"):
        say(TREE[:2])
    with pytest.raises(ClvrError, match="needs a color"):
        say([{"class": "star", "count": 1}, *FAN[1:]])
    with pytest.raises(ClvrError, match="not both"):
        say([*TREE[:3], TREE[3] | {"position": ["above", 0]}])
    with pytest.raises(ClvrError, match="one item must have one"):
        say([FAN[3]])
    with pytest.raises(ClvrError, match="style 99 does not exist"):
        say(TREE, style=99)
