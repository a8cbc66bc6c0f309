"""Which objects a verifier would accept: counted from descriptions whose probabilities are known."""

import math

import pytest

from clvr_jax.errors import UsageError
from clvr_jax.interfaces import ChatResponse, Token, Usage
from clvr_jax.scripts.shapes_reading import ReadObject, main, read_objects, recolored_summary, summary
from clvr_jax.worlds.shapes.detect import DetectedObject, Reading

READING = Reading(
    (DetectedObject("red", "star", "top left", 10, 10, 8), DetectedObject("purple", "star", "center", 32, 32, 8)),
    ("top", "bottom"),
)


def described(*clauses: tuple[str, float]) -> ChatResponse:
    tokens = [Token("I see ", 0.0)]
    for number, (clause, probability) in enumerate(clauses):
        tokens += [Token("; ", 0.0)] if number else []
        tokens.append(Token(clause, math.log(probability)))
    tokens.append(Token(".", 0.0))
    return ChatResponse("".join(token.text for token in tokens), Usage(), tuple(tokens))


def test_each_object_has_the_probability_of_its_clause():
    answer = described(
        ("red star top left", 0.9),
        ("blue cross top", 0.6),
        ("purple circle center", 1.0),
        ("something unclear bottom", 1),
    )
    found = read_objects(READING, answer)
    assert [(item.is_clear, item.is_held_out) for item in found] == [(True, False), (True, True), *[(False, False)] * 2]
    # Another shape is no reading of the purple star; "top" is not "top left"; what is called unclear is not accepted.
    assert [item.probability for item in found] == pytest.approx([0.9, 0.0, 0.6, 0.0])


def test_the_table_counts_at_every_threshold():
    clear = [ReadObject(True, False, value) for value in (0.0, 0.55, 0.85, 0.99)]
    unclear = [ReadObject(False, False, value) for value in (0.0, 0.65)]
    rows = {row[0]: row[1:] for row in summary([*clear, *unclear]).sections[0]}
    assert rows["0.000"] == ["0.500 of 2", "0.250 of 4", ""]
    assert rows["0.600"] == ["0.500 of 2", "0.500 of 4", ""]
    assert rows["0.700"] == ["0.000 of 2", "0.500 of 4", ""]
    assert rows["0.950"] == ["0.000 of 2", "0.750 of 4", ""]


def test_objects_in_another_color_are_compared_with_themselves():
    """The star in the center has another color and is doubted no longer; the other one keeps its color."""
    recolored = Reading(
        (DetectedObject("red", "star", "top left", 10, 10, 8), DetectedObject("blue", "star", "center", 32, 32, 8)),
        ("top", "bottom"),
    )
    before = described(("red star top left", 0.2), ("purple star center", 0.3))
    after = described(("red star top left", 0.9), ("blue star center", 0.8))
    found = recolored_summary([READING], [before], [[(READING, before), (recolored, after)]])
    assert "held-out pairs 1.000 of 1, then 0.000 of 1 (1 only before, 0 only then; mean" in found
    assert "0.300 and 0.800" in found
    assert "other pairs" not in found


def test_no_loops_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--loops 0: at least one"):
        main(images=tmp_path / "images.npz", loops=0)
