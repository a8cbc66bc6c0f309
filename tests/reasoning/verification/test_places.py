import pytest

from clvr_jax.reasoning.verification.places import claimed_twice, in_reading_order, place_of


@pytest.mark.parametrize(
    ("clause", "place"),
    [
        ("red star top left", "top left"),
        ("Red Star Center", "center"),
        ("something unclear bottom", "bottom"),
        ("red star", ""),
        ("red star left of blue cross", ""),
        ("", ""),
    ],
)
def test_the_place_ends_a_clause(clause, place):
    assert place_of(clause) == place


def test_two_things_claim_one_place():
    assert claimed_twice(["red star top", "blue cross left", "green circle top"]) == {"top"}
    assert not claimed_twice(["red star top", "blue cross top left", "red star", "red star"])


def test_clauses_are_read_row_by_row_and_those_without_a_place_last():
    grid = [f"x {row} {column}".strip() for row in ("top", "", "bottom") for column in ("left", "", "right")]
    grid[4] = "x center"
    assert in_reading_order([*grid[::-1], "two dogs", "a cat"]) == [*grid, "two dogs", "a cat"]
