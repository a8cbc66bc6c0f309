import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.language.grammar import PHRASINGS, phrase, sample_metadata, scene_for, vocabulary, words
from clvr_jax.worlds.shapes.layout import holds, plan
from clvr_jax.worlds.shapes.metadata import RELATIONS, TAGS, canonical_key, has_held_out_pair, parse_metadata
from clvr_jax.worlds.shapes.scene import CELLS, SHAPES


def item(shape: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": shape, "count": count, **more}


def request(*include: dict[str, Any], tag: str = "complex", **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": "a prompt", **more}


@pytest.mark.parametrize("tag", TAGS)
def test_samples_are_valid_satisfiable_and_in_the_vocabulary(tag: str) -> None:
    rng = np.random.default_rng(2)
    known = vocabulary()
    for _ in range(300):
        metadata = sample_metadata(rng, tag)
        assert parse_metadata(metadata) == metadata
        assert metadata["tag"] == tag
        assert set(words(metadata["prompt"])) <= known
        assert not has_held_out_pair(metadata)
        assert plan(metadata)
        pairs = [(entry.get("color"), entry["class"]) for entry in metadata["include"]]
        assert len(set(pairs)) == len(pairs)


def test_every_word_of_the_vocabulary_is_used() -> None:
    rng = np.random.default_rng(3)
    used: set[str] = set()
    for tag in TAGS:
        for index in itertools.islice(itertools.cycle(range(len(PHRASINGS[tag]))), 200):
            used |= set(words(sample_metadata(rng, tag, phrasing=index)["prompt"]))
    assert used == vocabulary()


@pytest.mark.parametrize("tag", TAGS)
def test_phrasings_of_a_tag_differ(tag: str) -> None:
    rng = np.random.default_rng(4)
    assert len(PHRASINGS[tag]) >= 4
    metadata = sample_metadata(rng, tag)
    texts = [{phrase(metadata, rng, index) for _ in range(30)} for index in range(len(PHRASINGS[tag]))]
    for first, second in itertools.combinations(texts, 2):
        assert not first & second
    assert sample_metadata(rng, tag, phrasing=2)["phrasing"] == 2
    with pytest.raises(ClvrError, match="phrasing 99"):
        sample_metadata(rng, tag, phrasing=99)


def test_tags_have_the_requests_of_geneval() -> None:
    rng = np.random.default_rng(5)
    for _ in range(100):
        assert [set(entry) for entry in sample_metadata(rng, "single_object")["include"]] == [{"class", "count"}]
        two = sample_metadata(rng, "two_object")["include"]
        assert two[0]["class"] != two[1]["class"]
        counting = sample_metadata(rng, "counting")
        count = counting["include"][0]["count"]
        assert 2 <= count <= 4
        assert counting["exclude"] == [item(counting["include"][0]["class"], count + 1)]
        position = sample_metadata(rng, "position")["include"]
        assert "position" not in position[0]
        assert position[1]["position"][1] == 0
        both = sample_metadata(rng, "color_attr")["include"]
        assert both[0]["color"] != both[1]["color"]


@pytest.mark.parametrize("tier", [3, 4, 5, 6, 9])
def test_complex_prompts_fix_the_number_of_every_shape(tier: int) -> None:
    rng = np.random.default_rng(tier)
    relations: Counter[str] = Counter()
    for _ in range(200):
        metadata = sample_metadata(rng, "complex", tier)
        counts = Counter[str]()
        for entry in metadata["include"]:
            counts[entry["class"]] += entry["count"]
            assert "color" in entry
            relations[entry["position"][0] if "position" in entry else "none"] += 1
        assert counts.total() == metadata["tier"] == tier
        assert metadata["exclude"] == [item(shape, counts[shape] + 1) for shape in SHAPES]
        assert any("position" in entry for entry in metadata["include"])
    assert all(relations[relation] > 10 for relation in RELATIONS)


def test_prompts_state_their_metadata() -> None:
    rng = np.random.default_rng(0)
    position = request(item("square", color="blue"), item("circle", position=["left of", 0]), tag="position")
    for index in range(len(PHRASINGS["position"])):
        text = phrase(position, rng, index)
        assert "left of" in text
        assert "a blue square" in text
        assert text.index("a circle") < text.index("a blue square") or " it" in text
    groups = request(item("cross", 2, color="orange"), item("star", color="red", position=["below", 0]))
    assert phrase(groups, rng, 6) in {
        f"There are also two orange crosses. A red star is {word} the two orange crosses."
        for word in ("below", "under")
    }
    assert phrase(request(item("cross", 3, color="orange"), tag="counting"), rng, 6).startswith("exactly three orange")


def test_unknown_tags_and_tiers_are_errors() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ClvrError, match="unknown tag 'colour'"):
        sample_metadata(rng, "colour")
    with pytest.raises(ClvrError, match="tier 3"):
        sample_metadata(rng, "colors", tier=3)
    with pytest.raises(ClvrError, match="tier 10"):
        sample_metadata(rng, "complex", tier=10)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (["not", "an", "object"], "must be a JSON object, got list"),
        (request(item("circle"), tag="colour"), "tag must be one of single_object"),
        ({"tag": "colors", "include": [item("circle")]}, "prompt must be a non-empty text"),
        (request(), "include must be a non-empty list"),
        (request("circle"), r"include\[0\] must be a JSON object"),
        (request(item("dog")), r"include\[0\].class must be one of circle, square"),
        (request(item("circle", 0)), r"include\[0\].count must be a whole number of at least 1, got 0"),
        (request(item("circle", True)), r"include\[0\].count must be a whole number"),
        (request({"class": "circle"}), r"include\[0\].count .* got None"),
        (request(item("circle", color="pink")), r"include\[0\].color must be one of red"),
        (request(item("circle", place="middle")), r"include\[0\].place must be one of top left"),
        (request(item("circle", 2, place="top")), r"include\[0\].place needs count 1"),
        (request(item("circle", colour="red")), r"include\[0\] has unknown keys colour; known: class, color"),
        (request(item("circle"), item("star", position=["left of"])), r"include\[1\].position must be \[relation"),
        (
            request(item("circle"), item("star", position=["beside", 0])),
            r"include\[1\].position\[0\] must be one of left",
        ),
        (request(item("circle"), item("star", position=["above", 1])), r"earlier item \(below 1\), got 1"),
        (request(item("circle", 5), item("star", 5)), "asks for 10 objects; the canvas has 9"),
        (request(item("circle", place="top"), item("star", place="top")), "two objects in one place"),
        (request(item("circle", 3), exclude=[item("circle", 3)]), r"exclude\[0\] forbids 3 of circle but .* 3"),
        (request(item("circle"), exclude=[item("star", 1, color="red")]), r"exclude\[0\] has unknown keys color"),
        (request(item("circle"), tier="high"), "tier must be a whole number"),
    ],
)
def test_errors_of_invalid_metadata_name_the_cause(broken: Any, message: str) -> None:
    with pytest.raises(ClvrError, match=message) as caught:
        parse_metadata(broken)
    assert "\n" not in str(caught.value)


def test_parsing_copies_and_keeps_unknown_keys() -> None:
    raw = request(item("circle"), item("star", position=["above", 0]), author="me")
    parsed = parse_metadata(raw)
    parsed["include"][1]["position"][0] = "below"
    assert raw["include"][1]["position"][0] == "above"
    assert parsed["author"] == "me"


def test_canonical_key_depends_on_the_request_not_on_the_wording() -> None:
    square, circle = item("square", color="blue"), item("circle", color="red")
    reworded = request(square, {**circle, "position": ["left of", 0]}, prompt="one")
    other_side = request(circle, {**square, "position": ["right of", 0]}, prompt="two", tag="position", phrasing=3)
    mirrored = request(square, {**circle, "position": ["right of", 0]})
    assert canonical_key(reworded) == canonical_key(other_side)
    assert canonical_key(reworded) != canonical_key(mirrored)
    assert canonical_key(reworded) != canonical_key(request(square, circle))
    assert canonical_key(request(circle)) != canonical_key(request(circle, exclude=[item("circle", 2)]))
    assert canonical_key(request(circle)) != canonical_key(request({**circle, "place": "top"}))


def test_plans_avoid_diagonal_neighbors() -> None:
    assert holds("left of", "left", "center")
    assert holds("left of", "top left", "right")
    assert not holds("left of", "top left", "center")
    assert not holds("left of", "top left", "bottom right")
    assert not any(holds(relation, cell, cell) for relation in RELATIONS for cell in CELLS)
    for first, second in itertools.product(CELLS, CELLS):
        assert holds("left of", first, second) == holds("right of", second, first)
        assert holds("above", first, second) == holds("below", second, first)


def test_canonical_plans_follow_the_stated_preference() -> None:
    def cells(*include: dict[str, Any]) -> list[str]:
        return [thing.cell for thing in plan(request(*include))]

    assert cells(item("circle", 4)) == ["center", "left", "right", "top"]
    assert cells(item("circle"), item("star", position=["below", 0])) == ["top", "center"]
    # The anchor is at the edge opposite to its relations, so that no backtracking is needed.
    beside = (item("star", position=["left of", 0]), item("cross", position=["below", 0]))
    assert cells(item("circle"), *beside) == ["top right", "top", "right"]
    assert cells(item("star"), item("circle", place="center")) == ["left", "center"]
    assert cells(item("star", place="bottom right"), item("circle", position=["above", 0])) == ["bottom right", "right"]
    # Above the center there is only one cell, so the anchor moves.
    assert cells(item("star"), item("circle", 2, position=["above", 0])) == ["bottom", "center", "top"]
    assert [str(thing) for thing in plan(request(item("star")))] == ["red star center"]


def test_impossible_arrangements_are_errors() -> None:
    impossible = request(item("star", place="top"), item("circle", position=["above", 0]))
    with pytest.raises(ClvrError, match="no arrangement of the 3 x 3 cells satisfies the prompt 'a prompt'"):
        plan(impossible)
    with pytest.raises(ClvrError, match="no arrangement"):
        scene_for(impossible, np.random.default_rng(0))


def test_random_plans_satisfy_and_vary() -> None:
    rng = np.random.default_rng(9)
    metadata = request(item("star"), item("circle", color="red", position=["above", 0]), tag="position")
    plans = {plan(metadata, rng) for _ in range(200)}
    assert len(plans) > 50
    for star, circle in plans:
        assert holds("above", circle.cell, star.cell)
        assert star.color != "purple"
    assert "purple" in {plan(metadata, rng, allow_held_out=True)[0].color for _ in range(100)}
