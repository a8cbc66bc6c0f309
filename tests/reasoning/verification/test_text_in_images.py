"""Tests of text in images: what a prompt quotes, whether lines say it, and the verifier that reads."""

import numpy as np
import pytest

from clvr_jax.interfaces import Usage
from clvr_jax.reasoning.verification.text_in_images import (
    TextLine,
    TextVerifier,
    find_text,
    quoted_texts,
    required_text,
    text_accuracy,
    text_requirement,
)
from clvr_jax.reasoning.verification.verification import Requirement, Verification, Verifier

IMAGE = np.zeros((8, 8, 3), np.uint8)


def lines(*texts, confidence=0.9):
    return tuple(TextLine(text, confidence) for text in texts)


class Reader:
    name = "reader"

    def __init__(self, *found):
        self.found, self.calls = found, 0

    def read_text(self, image):
        self.calls += 1
        return lines(*self.found)


class Scripted(Verifier):
    """Meets every requirement with a probability of .8; `asked` has what it was asked."""

    name = "model, ask"

    def __init__(self):
        self.asked, self.usage = [], Usage(calls=3)

    def derive(self, prompts):
        return [("a door", 'the image says "Open."') if "door" in prompt else () for prompt in prompts]

    def check(self, requirements, images):
        self.asked += requirements
        return [
            Verification(tuple(Requirement(text, True, 0.8) for text in texts), "I see.", "ask", self.name)
            for texts in requirements
        ]

    def check_plans(self, requirements, plans):
        return self.check(requirements, plans)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('a sign that says "OPEN  24 h" and "closed"', ("OPEN 24 h", "closed")),
        (
            "\u201cMilk\u201d, \u00abLait\u00bb, \u201eMilch\u201c, \u300c\u725b\u4e73\u300d",
            ("Milk", "Milch", "Lait", "\u725b\u4e73"),
        ),
        ("the cat's \"...\" and 'single' quotes", ()),
        ('an open quote " only', ()),
        ('"A" and "A"', ("A",)),
    ],
)
def test_quoted_texts(prompt, expected):
    assert sorted(quoted_texts(prompt)) == sorted(expected)


def test_a_text_is_found_as_whole_words_across_lines_whatever_the_case():
    read = (TextLine("GRAND", 0.9), TextLine("OPE NING!", 0.7), TextLine("\u4eca\u5929\u8425\u4e1a\u4e2d", 0.8))
    assert find_text("Grand Opening", read) == 0.7
    assert find_text("grand", read) == 0.9
    assert find_text("\u8425\u4e1a", read) == 0.8
    assert find_text("opening grand", read) is None
    assert find_text("ran", read) is None  # not a whole word
    assert find_text("Grand Opening", ()) is None
    assert find_text("don\u2019t", lines("DON'T")) == 0.9


def test_accuracy_is_the_share_of_letters_of_the_nearest_part():
    assert text_accuracy("OPEN", lines("we are open now")) == 1
    assert text_accuracy("OPEN", lines("OPFN")) == 0.75
    assert text_accuracy("OPEN", lines("OPN")) == 0.75
    assert text_accuracy("OPEN", lines("xyz")) == 0
    assert text_accuracy("OPEN", ()) == 0


def test_requirements_of_text_round_trip():
    assert required_text(text_requirement("OPEN 24 h")) == "OPEN 24 h"
    assert required_text('The image says "5 O\'Clock".') == "5 O'Clock"
    assert required_text("the image says hello") is None
    assert required_text('the image says "..."') is None
    assert required_text('the sign says "OPEN"') is None


def test_text_is_read_and_everything_else_is_asked():
    model, reader = Scripted(), Reader("OPEN", "24 h")
    verifier = TextVerifier(model, reader)
    prompt = 'a door with "open" above "24 h" and "Sale"'
    (derived,) = verifier.derive([prompt])
    # The model's own text requirement is not repeated.
    assert derived == ("a door", 'the image says "Open."', 'the image says "24 h"', 'the image says "Sale"')
    (checked,) = verifier.verify([prompt], [IMAGE])
    assert model.asked == [["a door"]]
    assert [(each.text, each.met, each.probability) for each in checked.requirements] == [
        ("a door", True, 0.8),
        ('the image says "Open."', True, 0.9),
        ('the image says "24 h"', True, 0.9),
        ('the image says "Sale"', False, 0.0),
    ]
    assert checked.requirements[3].evidence == 'read: "OPEN"; "24 h"'
    assert checked.unmet == ('the image says "Sale"',)
    assert (checked.verifier, checked.description) == ("model, ask, text by reader", "I see.")
    assert (verifier.usage.calls, verifier.adapted) == (3, ())
    assert Verification.from_dict(checked.to_dict()) == checked


def test_an_image_without_a_text_requirement_is_not_read():
    reader = Reader()
    (checked,) = TextVerifier(Scripted(), reader).check([["a door"]], [IMAGE])
    assert checked.accepted
    assert reader.calls == 0
    (empty,) = TextVerifier(Scripted(), reader).check([['the image says "x"']], [IMAGE])
    assert (empty.accepted, empty.requirements[0].evidence) == (False, "read: nothing")


def test_a_plan_must_have_the_words():
    required = [["a door", 'the image says "24 h"']] * 2
    plans = ['Plan: a door; a sign "24 H".', "Plan: a door; a sign."]
    good, bad = TextVerifier(Scripted(), Reader()).check_plans(required, plans)
    assert good.accepted
    assert (bad.accepted, bad.requirements[1].evidence) == (False, "not in the plan")
