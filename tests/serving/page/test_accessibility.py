"""Axe, the keyboard, colors, and the saved page beside the live one."""

import re

import pytest

from tests.serving.conftest import PROMPT
from tests.serving.page.browser import violations
from tests.serving.page.helpers import SIZES, TREE, UNMET, ended, until


@pytest.mark.slow
def test_the_saved_page_shows_a_verification_in_the_same_form(open_page, server, loop_id):
    page = ended(open_page(f"/#{loop_id}"))
    checks = page.locator("#steps .checks").evaluate_all(f"(all) => all.map({TREE})")
    table = page.locator("#board table").evaluate(TREE)
    colors = page.locator("#steps .checks tr").evaluate_all(
        "(all) => all.map((row) => getComputedStyle(row).backgroundColor)"
    )
    page.goto((server.out / loop_id / "index.html").as_uri())
    assert len(checks) == 2
    assert page.locator(".steps .checks").evaluate_all(f"(all) => all.map({TREE})") == checks
    assert page.locator(".board table").evaluate(TREE) == table
    saved = page.locator(".steps .checks tr").evaluate_all(
        "(all) => all.map((row) => getComputedStyle(row).backgroundColor)"
    )
    assert saved == colors
    assert len(set(colors)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "color_scheme"), [("wide", "light"), ("wide", "dark"), ("narrow", "light"), ("narrow", "dark")]
)
def test_accessibility(open_page, server, loop_id, size, color_scheme):
    page = open_page(size=size, color_scheme=color_scheme)
    assert violations(page) == []
    page.click("text=More settings")
    page.evaluate("id => { location.hash = id; }", loop_id)
    ended(page)
    page.click("#toolbar >> text=Compare")
    page.wait_for_selector("#compare:not([hidden]) img.crisp")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0], "nothing is wider than the screen"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) is (color_scheme == "dark")
    page.goto((server.out / loop_id / "index.html").as_uri())
    assert violations(page) == []


def test_the_dialog_for_the_key_is_accessible_and_a_wrong_key_is_refused(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#key-dialog[open]")
    assert violations(page) == []
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('key-error').textContent !== ''")
    assert page.inner_text("#key-error") == "The server does not accept this key."
    assert page.locator("#entries li").count() == 0
    context.close()


@pytest.mark.slow
def test_keys_alone_start_a_loop_and_move_the_border(open_page, loop_id):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = []
    while not seen or seen[-1] != "prompt":
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
    page.keyboard.type(PROMPT)
    while seen[-1] != "generate":
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    assert {"files", "mode", "max_steps", "candidates", "max_nfe", "seed"} <= set(seen)
    page.focus("[name=mode]:checked")
    page.keyboard.press("ArrowRight")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    page.wait_for_url("**/#loop_*")
    ended(page)
    assert page.inner_text("#overline .badge") == "one shot"
    page.evaluate("id => { location.hash = id; }", loop_id)
    until(page, "prompt => document.getElementById('title').textContent === prompt", arg=UNMET)
    ended(page)
    page.focus("#toolbar >> text=Compare")
    page.keyboard.press("Enter")
    page.wait_for_selector("#compare:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "compare"
    page.focus("#compare .border")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('.stage').style.getPropertyValue('--at')") == "51%"
    assert page.get_attribute("#compare .border", "aria-valuetext").startswith("51 % Image 1")
