import pytest

from clvr_jax.evaluation.benchmarks.imaginebench import AXES, official_scores
from clvr_jax.evaluation.benchmarks.wise import legacy_scores, verified_score
from clvr_jax.evaluation.judging.replies import json_score, labeled_scores, yes_or_no
from clvr_jax.interfaces.answers import AnswerError

PLAIN = "Fantasy Fulfillment: 8\nReason: a\n\nIdentity Preservation: 9\nReason: b\n\nAesthetic Quality: 7\nReason: c"


@pytest.mark.parametrize(
    "reply",
    [
        PLAIN,
        "**Fantasy Fulfillment:** 8\n**Identity Preservation:** 9\n**Aesthetic Quality:** 7",
        "**Fantasy Fulfillment**: 8\n**Identity Preservation**: 9\n**Aesthetic Quality**: 7",
        "Certainly! Here is what I think.\n\n1. Fantasy Fulfillment: 8/10\n- Identity Preservation (0-10): **9**\n"
        "### Aesthetic Quality: 7.0\nThe Aesthetic Quality could be better with softer light.",
        PLAIN.lower().replace(":", "\uff1a"),
    ],
)
def test_scores_are_read_through_decoration(reply):
    assert list(labeled_scores(reply, AXES, 0, 10).values()) == [8, 9, 7]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("I cannot judge this.", "no line Fantasy Fulfillment"),
        ("", "no line"),
        (PLAIN.replace("8", "12"), "from 0 to 10, got 12"),
        (PLAIN.replace("8", "-1"), "from 0 to 10"),
        (PLAIN + "\nFantasy Fulfillment: 3", "2 scores for Fantasy Fulfillment"),
        (PLAIN.replace("8", "7-8"), "two scores"),
        (PLAIN.replace("8", "7 or 8"), "two scores"),
        (PLAIN.replace("8", "4/5"), "out of 5"),
        (PLAIN.replace("Identity Preservation: 9", "Identity Preservation: high"), "no line Identity"),
    ],
)
def test_what_is_no_score(reply, said):
    with pytest.raises(AnswerError, match=said):
        labeled_scores(reply, AXES, 0, 10)


# Expected: extract_scores of the official script on the same replies.
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (PLAIN, [8, 9, 7]),
        (PLAIN.replace("Fantasy Fulfillment:", "**Fantasy Fulfillment:**"), [-1, 9, 7]),
        ("**Fantasy Fulfillment**: 8\n**Identity Preservation**: 9\n**Aesthetic Quality**: 7", [-1, -1, -1]),
        (PLAIN.replace("8", "12"), [10, 9, 7]),
        (PLAIN.replace("8", "3") + "\nFantasy Fulfillment: 8", [8, 9, 7]),
        ("I cannot judge this.", [-1, -1, -1]),
        ("Fantasy Fulfillment: 8\nAesthetic Quality: 7", [8, -1, 7]),
    ],
)
def test_official_reading_of_imaginebench(reply, expected):
    assert list(official_scores(reply).values()) == expected


def test_wise_reads_what_its_scripts_read_and_nothing_out_of_range():
    good = {"Consistency": 2, "Realism": 1, "Aesthetic Quality": 0}
    for reply in (
        "Consistency: 2\nRealism: 1\nAesthetic Quality: 0",
        "**Consistency**: 2\n**Realism**: 1\n**Aesthetic Quality**: 0",
        "2\n1\n0",
    ):
        assert legacy_scores(reply) == good
    for reply in ("Consistency: 9\nRealism: 1\nAesthetic Quality: 0", "Consistency: 1.5\nRealism: 1\n2", "nothing"):
        with pytest.raises(AnswerError):
            legacy_scores(reply)
    assert [verified_score(reply) for reply in ("Score: 1", "**Score**: 0", "1", "**Score:** 1")] == [1, 0, 1, 1]
    for reply in ("Score: 2", "The score is 1", "Score: 0\nScore: 1", "01"):
        with pytest.raises(AnswerError):
            verified_score(reply)


def test_scores_in_json():
    assert json_score('```json\n{"justification": "a", "score": 7.5}\n```', "score", 0, 10) == 7.5
    assert json_score('Sure: {"correct": true}', "correct", 0, 1, whole=True) == 1
    for reply in ('{"score": "7"}', '{"score": 11}', '{"points": 7}', "seven", '{"score": 7'):
        with pytest.raises(AnswerError):
            json_score(reply, "score", 0, 10)


def test_yes_or_no():
    assert [yes_or_no(reply) for reply in ("yes", "No.", "Yes, there is a dog.", "**no**")] == [
        True,
        False,
        True,
        False,
    ]
    for reply in ("", "maybe", "yes and no", "nothing"):
        with pytest.raises(AnswerError):
            yes_or_no(reply)
