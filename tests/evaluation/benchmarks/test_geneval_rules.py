"""GenEval's rules. The expected verdicts and relations were computed by the functions of the official
evaluate_images.py (djghosh13/geneval at af4902f) on random detections of ours."""

import json
from pathlib import Path

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.geneval_rules import (
    OBJECTS,
    Detection,
    check,
    check_metadata,
    keep_confident,
    objects_to_color,
    relations,
)

HERE = Path(__file__).parent


def lines(name):
    return [json.loads(line) for line in (HERE / name).read_text().splitlines()]


def objects(case):
    return {
        name: [Detection(tuple(one["box"]), one["confidence"], one["color"]) for one in each]
        for name, each in case["found"].items()
    }


def test_verdicts_are_the_official_ones():
    cases = lines("geneval_cases.jsonl")
    assert len(cases) == 90
    for case in cases:
        correct, reasons = check(keep_confident(objects(case), case["metadata"]["tag"]), case["metadata"])
        assert (correct, len(reasons)) == (case["correct"], case["reasons"]), case


def test_relations_are_the_official_ones():
    for box, other, expected in lines("geneval_relations.jsonl"):
        assert sorted(relations(box, other)) == expected


def test_thresholds_and_the_limit_of_sixteen():
    sure, unsure = [Detection((0, 0, 1, 1), 0.95)] * 20, [Detection((0, 0, 1, 1), 0.5)] * 3
    assert len(keep_confident({"dog": sure}, "colors")["dog"]) == 16
    assert "dog" not in keep_confident({"dog": unsure}, "counting")
    assert len(keep_confident({"dog": unsure}, "colors")["dog"]) == 3
    assert "dog" not in keep_confident({"dog": [Detection((0, 0, 1, 1), 0.3)]}, "colors")  # above, not at


def test_a_direction_needs_more_than_the_slack_and_half_of_the_distance():
    box = (0, 0, 10, 10)
    assert relations(box, (1.9, 0, 11.9, 10)) == set()  # a fifth of the side is slack
    assert relations(box, (12, 0, 22, 10)) == {"left of"}
    assert relations((12, 12, 22, 22), box) == {"right of", "below"}


def test_colors_are_asked_for_only_where_they_decide():
    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}, {"class": "cat", "count": 1}]}
    assert objects_to_color({"dog": [Detection((0, 0, 1, 1), 1)], "cat": []}, metadata) == {}
    assert objects_to_color({"dog": [Detection((0, 0, 1, 1), 1)] * 3}, metadata) == {"dog": 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tag": ""}, "tag"),
        ({"include": []}, "include"),
        ({"include": [{"class": "mouse", "count": 1}]}, "computer mouse"),
        ({"include": [{"class": "dog", "count": 0}]}, "count of dog"),
        ({"include": [{"class": "dog", "count": 1, "color": "teal"}]}, "teal"),
        ({"include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "earlier clause"),
        ({"exclude": [{"count": 1}]}, "None"),
    ],
)
def test_metadata_that_the_rules_cannot_read(change, said):
    good = {"tag": "colors", "include": [{"class": "dog", "count": 1}]}
    check_metadata(good)
    with pytest.raises(ClvrError, match=said):
        check_metadata({**good, **change})


def test_there_are_eighty_classes():
    assert len(set(OBJECTS)) == 80
