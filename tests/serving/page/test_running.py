"""A loop from the prompt to its end, as the page shows it."""

import json
import re

import pytest

from tests.serving.api.test_loops import BODY, events_of
from tests.serving.conftest import KEY, PROMPT, wait_until
from tests.serving.page.helpers import UNMET, advance, ended, until


def test_a_prompt_becomes_a_finished_loop(open_page, http, server):
    page = open_page(key=None)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", KEY)
    page.click("#key-form button")
    page.wait_for_selector("body[data-is-ready]")
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "1")
    page.evaluate("document.getElementById('max_steps').value = 2")
    page.click("#generate")
    page.wait_for_url("**/#loop_*")
    ended(page)
    loop_id = page.url.split("#")[1]
    item = http.get(f"/v1/loops/{loop_id}").json()
    assert (item["prompt"], item["seed"], item["request"]["max_steps"]) == (PROMPT, 1, 2)
    assert page.inner_text("#title") == PROMPT
    assert page.inner_text("#overline .badge") == item["outcome"]
    steps = [step for step in item["steps"] if step["image_id"]]
    assert page.locator("#steps .mat img").count() == len(steps) == item["images"]
    assert page.evaluate("document.querySelector('#figure img').naturalWidth") == 64
    shown = [row.split() for row in page.locator("#steps .checks tr").all_inner_texts()]
    requirements = [each for step in steps for each in step["verification"]["requirements"]]
    assert len(shown) == len(requirements)
    for words, requirement in zip(shown, requirements, strict=True):
        assert words[1] == {True: "met", False: words[1]}[requirement["met"]]
        assert " ".join(words).count(requirement["text"]) >= 1
    assert page.locator("#board tbody th").all_inner_texts() == [
        each["text"] for each in steps[0]["verification"]["requirements"]
    ]
    assert page.locator(".verifier").first.inner_text() == f"Verified by {steps[0]['verification']['verifier']}"
    assert page.locator("#entries li.current .entry-prompt").inner_text() == PROMPT
    assert sum(step["nfe"] for step in steps) == int(page.inner_text("#facts div:nth-child(3) dd"))


@pytest.mark.slow
def test_what_happens_is_shown_while_it_happens(open_page, gate, server):
    page = open_page()
    page.fill("#prompt", UNMET)  # the first image of this seed does not meet it
    page.fill("#seed", "1")
    page.evaluate("document.getElementById('max_steps').value = 2")  # more images are more programs
    page.click("#generate")
    page.wait_for_url("**/#loop_*")
    activity = "document.getElementById('activity-text').textContent === "
    for text in (
        "Deriving the requirements from the prompt",
        "Planning",
        "Verifying the plan",
        "Generating image 1, 4 denoising steps",
        "Verifying image 1",
    ):
        advance(page, gate, server, f"{activity}{text!r}")
    assert page.locator("#steps .mat img").count() == 1
    assert page.locator("#steps .checks").count() == 0
    assert page.is_enabled("text=Accept now")
    advance(page, gate, server, "document.querySelector('#steps .checks')")
    assert re.match(r"Image 1 meets \d of \d requirements?. Unmet: \w", page.inner_text("#announcer"))
    gate.is_open = True
    ended(page)
    assert page.inner_text("#announcer").startswith("The loop has ended: ")


@pytest.mark.slow
def test_accept_takes_the_best_image(open_page, gate, http, server):
    page = open_page()
    page.fill("#prompt", UNMET)
    page.fill("#seed", "1")
    page.click("#generate")
    page.wait_for_url("**/#loop_*")
    accept = page.locator("text=Accept now")
    accept.wait_for()
    assert accept.is_disabled(), "there is no image yet"
    advance(page, gate, server, "document.querySelector('#steps .mat img')")
    accept.click()
    until(page, "document.getElementById('activity-text').textContent.startsWith('Accepting')")
    gate.is_open = True
    ended(page)
    item = http.get(f"/v1/loops/{page.url.split('#')[1]}").json()
    assert (item["status"], item["images"]) == ("finished", 1)
    assert page.inner_text("#overline .badge") == item["outcome"]
    assert page.locator("#figure img").count() == 1


@pytest.mark.slow
def test_cancel_keeps_the_best_image_and_places_in_the_queue_are_shown(open_page, gate, http, server):
    others = [http.post("/v1/loops", json=BODY).json()["id"]]
    wait_until(lambda: gate.is_holding)  # the first one has the device; together, both would start
    others.append(http.post("/v1/loops", json=BODY).json()["id"])
    page = open_page()
    page.fill("#prompt", UNMET)
    page.click("#generate")
    until(page, "document.getElementById('activity-text').textContent === 'Waiting, 1 request ahead'")
    for each in others:
        http.post(f"/v1/loops/{each}/cancel")
    advance(page, gate, server, "document.querySelector('#steps .mat img')")
    page.click("#toolbar >> text=Cancel")
    until(page, "document.getElementById('activity-text').textContent.startsWith('Canceling')")
    gate.is_open = True
    ended(page)
    assert page.inner_text("#overline .badge") == "canceled"
    assert "The best image so far is kept." in page.inner_text("#overline")
    assert http.get(f"/v1/loops/{page.url.split('#')[1]}").json()["status"] == "canceled"
    assert page.evaluate("document.querySelector('#figure img').naturalWidth") == 64


@pytest.mark.slow
def test_a_lost_connection_is_resumed_after_the_last_event(open_page, http, loop_id):
    """The first stream ends after three events, as if the connection was lost."""
    events, _ = events_of(http, loop_id)
    text = "".join(f"id: {each['id']}\nevent: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events[:3])
    asked = []
    page = open_page()

    def answer(route):
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) == 1:
            route.fulfill(content_type="text/event-stream", body=text + ": keepalive\n\nid: 3\nev")
        else:
            route.continue_()

    page.route("**/events", answer)
    page.evaluate("id => { location.hash = id; }", loop_id)
    ended(page)
    assert asked == [None, "2"]
    assert page.locator("#steps .checks").count() == 2
