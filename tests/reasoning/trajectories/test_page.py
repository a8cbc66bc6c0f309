import base64
import dataclasses
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory, Verdict
from clvr_jax.reasoning.trajectories.edits import Edit, Parent
from clvr_jax.reasoning.trajectories.page import render
from clvr_jax.reasoning.trajectories.trajectory import OUTCOMES
from clvr_jax.reasoning.verification.verification import Requirement, Verification


class Page(HTMLParser):
    """Elements with their attributes, the text without style, and unclosed elements."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def image(size, value=50):
    return np.full((size, size, 3), value, np.uint8)


def make(**changes):
    first = Step("Plan: red dot; blue dot. Draw a red dot.", IMAGE_GEN, (), image(64), Verdict(("blue dot",)), 4, 1.25)
    second = Step(
        "Unmet: blue dot. Add it.", IMAGE_GEN, (0,), image(64, 90), Verdict(("red dot", "blue dot")), 4, 1.0, True
    )
    third = Step("Unmet: blue dot. Add it.", IMAGE_GEN, (0,), image(64, 99), Verdict(()), 4, 1.0, attempts=2, redraw=1)
    last = Step("Unmet: nothing.", TERMINATE, seconds=0.1)
    given = {"prompt": "two dots", "steps": (first, second, third, last), "outcome": "accepted", "seconds": 3.35}
    return Trajectory(**{**given, **changes})


def test_page_is_well_formed_and_needs_no_network():
    html = render(make())
    page = Page(html)
    assert not page.open
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"}
    sources = [attributes["src"] for attributes in page.all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"(?:https?:)?//\w", re.sub(r"base64,[^\"]*", "", html))
    assert "url(" not in html


def test_pictures_are_embedded_unchanged_and_enlarged_by_whole_pixels():
    images = Page(render(make())).all("img")
    assert len(images) == 4
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each["src"].split(",")[1])))) for each in images]
    assert [int(each[0, 0, 0]) for each in decoded] == [99, 50, 90, 99]  # the result first
    assert [each["width"] for each in images] == ["384", "192", "192", "192"]
    assert {each["class"] for each in images} == {"crisp"}


def test_large_pictures_are_shown_as_they_are():
    steps = (Step("Draw.", IMAGE_GEN, image=np.zeros((300, 500, 3), np.uint8)),)
    first = Page(render(make(steps=steps, outcome="step limit"))).all("img")[0]
    assert (first["width"], first["height"], "class" in first) == ("500", "300", False)


def test_everything_is_escaped():
    nasty = "<script>alert('x')</script> & \" $prompt ${steps}"
    step = Step(f"Plan: {nasty}. {nasty} Unmet: {nasty}.", IMAGE_GEN, (), image(8), Verdict((nasty,)))
    html = render(
        make(prompt=nasty, steps=(step,), outcome="unparseable", model=nasty, versions={nasty: nasty}, error=nasty)
    )
    page = Page(html)
    assert not page.open
    assert not page.all("script")
    assert page.text.count("<script>alert('x')</script> & \" $prompt ${steps}") >= 6


def test_page_tells_the_story():
    page = Page(render(make()))
    assert "two dots" in page.text
    assert "3 (1 rolled back)" in page.text
    assert "4 NFE" in page.text
    assert "1.25 s" in page.text
    assert "readable at attempt 2" in page.text
    assert "generated again (1)" in page.text
    assert [each.get("class") for each in page.all("li") if each.get("class") in ("kept", "rolled")] == [
        "kept",
        "rolled",
        "kept",
    ]


def test_checklist_counts_what_is_unmet_in_every_picture():
    text = Page(render(make())).text
    board = text[text.index("Checklist") : text.index("How it came about")]
    assert board.strip() == "Checklist Image 1 2 3 red dot ✓ ○ ✓ blue dot ○ ○ ✓ unmet 1 2 0"


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_can_be_shown_without_any_picture(outcome):
    page = Page(render(Trajectory("p", (), outcome)))
    assert "No image was generated." in page.text
    assert not page.open


def test_light_and_dark_small_screens_and_print():
    html = render(make())
    for feature in ("prefers-color-scheme: dark", "max-width: 46rem", "@media print", "image-rendering: pixelated"):
        assert feature in html


# --- trajectories with a verification ---------------------------------------------------------------------------------


def verification(*requirements, description="I see a red dot."):
    return Verification(tuple(requirements), description, "describe", "toy, describe")


def verified(**changes):
    first = verification(
        Requirement("red dot", True, 0.9996, "the dot is red"),
        Requirement("blue dot", False, 0.25, "no second dot"),
        Requirement("green dot", None, None, "no answer in 'maybe'"),
    )
    second = verification(
        Requirement("red dot", True, 0.9, "still red"),
        Requirement("blue dot", True, 0.75, "a blue dot below"),
        Requirement("green dot", True, None, "a green dot"),
        description="I see all dots.",
    )
    steps = (
        # The controller's own verdict says otherwise; the verification counts.
        Step("Plan: one; two.", IMAGE_GEN, (), image(64), Verdict(()), 4, 1.0, verification=first),
        Step("Unmet: blue dot. Add it.", IMAGE_GEN, (0,), image(64, 90), Verdict(("x",)), 4, 1.0, verification=second),
    )
    return make(**{"prompt": "three dots", "steps": steps, **changes})


def board_of(text):
    return text[text.index("Requirements") : text.index("How it came about")].strip()


def test_the_board_shows_requirements_with_their_probabilities():
    page = Page(render(verified()))
    assert not page.open
    assert board_of(page.text) == (
        "Requirements Image 1 2 red dot ✓ >0.99 ✓ 0.90 blue dot ○ 0.25 ✓ 0.75 green dot ? ✓ unmet 2 0 met, expected "
        "1.25 2.65"
    )
    widths = [each["style"] for each in page.all("span") if "style" in each]
    assert widths[:4] == ["width:100%", "width:90%", "width:25%", "width:75%"]
    tips = [each["title"] for each in page.all("span") if "title" in each]
    assert "unmet; probability of being met 0.25; no second dot" in tips
    assert "no answer; no probability; no answer in 'maybe'" in tips
    assert "Checklist" not in page.text


def test_a_step_shows_requirement_by_requirement_who_checked_and_on_what_evidence():
    text = Page(render(verified())).text
    steps = text[text.index("How it came about") :]
    for part in (
        "2 unmet",
        "✓ met red dot the dot is red >0.99",
        "○ unmet blue dot no second dot 0.25",
        "? no answer green dot no answer in 'maybe' no probability",
        "Description I see a red dot. Verified by toy, describe",
        "nothing unmet",
        "✓ met blue dot a blue dot below 0.75",
        "Description I see all dots.",
    ):
        assert part in steps, part
    assert "Image 2 of 2, nothing unmet" in text


def test_what_a_step_has_gained_is_marked():
    rows = [each["class"] for each in Page(render(verified())).all("tr") if "class" in each]
    assert rows == ["met just", "unmet", "unmet", "met", "met just", "met just"]


def test_the_note_says_who_accepted():
    assert "The verification found every requirement met." in Page(render(verified())).text
    alone = Page(render(make())).text
    assert "The controller judged the last image and found nothing unmet." in alone
    assert "verification" not in alone
    unverified = Page(render(Trajectory("p", (Step("Unmet: nothing.", TERMINATE),), "unverified"))).text
    assert "The controller stopped; nothing was verified." in unverified


def test_a_prompt_without_requirements_has_nothing_to_check():
    step = Step("Draw.", IMAGE_GEN, (), image(64), verification=verification())
    page = Page(render(make(steps=(step,), outcome="unverified")))
    assert not page.open
    assert "nothing to check" in page.text
    assert "The prompt asks for nothing that can be checked." in page.text
    assert [each["class"] for each in page.all("span") if each.get("class", "").startswith("badge ")] == [
        "badge open",  # the outcome
        "badge open",
    ]


def test_an_image_that_was_not_verified_among_others_that_were():
    steps = (*verified().steps, Step("Add it.", IMAGE_GEN, (1,), image(64), Verdict(("a",)), rolled_back=True))
    board = board_of(Page(render(verified(steps=steps, outcome="step limit"))).text)
    assert "red dot ✓ >0.99 ✓ 0.90 ·" in board
    assert "unmet 2 0 1 met, expected 1.25 2.65 ?" in board


def test_everything_in_a_verification_is_escaped():
    nasty = "<script>alert('x')</script> & \" onmouseover=\"x ${steps}"
    checked = Verification((Requirement(nasty, False, 0.2, nasty), Requirement(nasty, None)), nasty, nasty, nasty)
    step = Step("Draw.", IMAGE_GEN, (), image(8), verification=checked)
    page = Page(render(make(steps=(step,), outcome="step limit")))
    assert not page.open
    assert not page.all("script")
    assert not any("onmouseover" in each for _, each in page.elements)
    assert page.text.count(nasty) >= 6


@pytest.mark.parametrize(
    ("probability", "shown"), [(0.0, "0.00"), (0.001, "<0.01"), (0.5, "0.50"), (0.9999, ">0.99"), (1.0, "1.00")]
)
def test_what_is_not_quite_certain_is_not_shown_as_certain(probability, shown):
    checked = verification(Requirement("red dot", probability > 0.4, probability))
    step = Step("Draw.", IMAGE_GEN, (), image(8), verification=checked)
    text = Page(render(make(steps=(step,), outcome="step limit"))).text
    assert re.search(rf"red dot [○✓] {shown} ", text)


def test_an_unmet_requirement_that_is_described_as_met_is_in_doubt():
    checked = verification(Requirement("red dot", False, 0.67, "the dot is red"), Requirement("blue dot", False, 0.4))
    step = Step("Draw.", IMAGE_GEN, (), image(64), verification=checked)
    page = Page(render(make(steps=(step,), outcome="step limit")))
    assert "red dot ◐ 0.67 blue dot ○ 0.40 unmet 2" in board_of(page.text)
    assert "◐ doubt red dot the dot is red 0.67 ○ unmet blue dot 0.40 Doubt: described as met" in page.text
    assert "doubt; probability of being met 0.67; the dot is red" in [each.get("title") for each in page.all("span")]
    assert [each["class"] for each in page.all("tr") if "class" in each] == ["doubt", "unmet"]
    assert "Doubt:" not in Page(render(verified())).text


# --- what the user changed --------------------------------------------------------------------------------------------


def test_edits_stand_where_they_were_made():
    edits = (
        Edit(0, ("red dot", "blue dot"), "Draw a red dot."),
        Edit(2, rollback_to=0, dropped=(1,)),
        Edit(4, instruction="Add a <b>dot</b>."),
    )
    first, *others = make().steps
    steps = (dataclasses.replace(first, reasoning="Draw a red dot.", attempts=0), *others)
    page = Page(render(make(steps=steps, edits=edits)))
    assert not page.open
    entries = [each.get("class") for each in page.all("li")]
    expected = ["edit", "kept", "rolled", "edit", "kept", "stop accepted", "edit"]
    assert [each for each in entries if each in expected] == expected
    assert "Plan changed by the user Requirements red dot blue dot Instruction Draw a red dot. 1" in page.text
    assert "✎ Returned to image 1 by the user Dropped images 2 3" in page.text
    assert page.text.endswith("✎ Plan changed by the user Instruction Add a <b>dot</b>.")
    assert page.text.count("instruction of the user") == 1, "at the first image"
    assert "attempt 0" not in page.text


def test_a_branch_names_its_parent():
    page = Page(render(make(parent=Parent("loop_<b>", 4, 2))))
    assert not page.open
    assert "Branch of loop_<b> from image 5" in page.text
    assert page.text.count("of the loop before") == 3, "two images, and their number at the top"
    assert "3 (1 rolled back, 2 of the loop before)" in page.text
    assert "Branch of" not in Page(render(make())).text
