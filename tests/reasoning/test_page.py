import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory, Verdict
from clvr_jax.reasoning.page import render
from clvr_jax.reasoning.trajectory import OUTCOMES


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
    assert "drawn again (1)" in page.text
    assert [each.get("class") for each in page.all("li") if each.get("class") in ("kept", "rolled")] == [
        "kept",
        "rolled",
        "kept",
    ]


def test_checklist_counts_what_is_unmet_in_every_picture():
    text = Page(render(make())).text
    board = text[text.index("Checklist") : text.index("How it came about")]
    assert board.strip() == "Checklist Picture 1 2 3 red dot ✓ ○ ✓ blue dot ○ ○ ✓ unmet 1 2 0"


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_can_be_shown_without_any_picture(outcome):
    page = Page(render(Trajectory("p", (), outcome)))
    assert "No picture was drawn." in page.text
    assert not page.open


def test_light_and_dark_small_screens_and_print():
    html = render(make())
    for feature in ("prefers-color-scheme: dark", "max-width: 46rem", "@media print", "image-rendering: pixelated"):
        assert feature in html
