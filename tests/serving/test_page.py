"""The page in a real headless Chromium, with the shipped model behind it."""

import base64
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.image_io import encode_png
from tests.serving.browser import chromium, violations
from tests.serving.conftest import KEY, LIMITS, PROMPT, wait_until
from tests.serving.test_loops import BODY, events_of

SECONDS = 300
"""How long to wait for what takes a second on an idle machine."""
SIZES = {"wide": (1280, 900), "narrow": (360, 740)}
UNMET = "two red circles above a blue square"
_MARKUP = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script> a red circle"
_TREE = """(root) => {
  const text = (node) => node.data.replace(/\\s+/g, " ").trim();
  const style = (node) => (node.getAttribute("style") ?? "").replace(/[ ;]/g, "");
  const tree = (node) => node.nodeType === Node.TEXT_NODE ? text(node)
    : [node.localName, node.className, style(node), ...[...node.childNodes].map(tree).filter((each) => each !== "")];
  return JSON.stringify(tree(root));
}"""
"""An element as a tree of names, classes, styles and texts, without white space that is not shown."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(browser, server):
    """Opens the page with the key; at the end nothing may have been written to the console as an error."""
    contexts, problems = [], []

    def opened(path="/", size="wide", color_scheme="light", key=KEY, **options):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=color_scheme, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda each: problems.append(each.text) if each.type in ("error", "warning") else None)
        page.on("pageerror", lambda each: problems.append(str(each)))
        page.goto(server.url + "/")
        if key:
            page.evaluate("key => sessionStorage.setItem('clvr-key', key)", key)
            page.goto(server.url + path)
            page.reload()
            page.wait_for_selector("body[data-is-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="module")
def loop_id(server):
    """A finished loop with several images."""
    with server.client() as client:
        found = client.post("/v1/loops", json={"prompt": UNMET, "seed": 1, "max_steps": 2}).json()["id"]
        events_of(client, found)
        assert client.get(f"/v1/loops/{found}").json()["images"] == 2
    return found


def until(page, condition, arg=None):
    """Waits until a JavaScript function or expression gives true. Playwright's own way needs eval, which the policy of
    the page does not allow."""
    wait_until(lambda: page.evaluate(condition, arg), SECONDS)


def advance(page, gate, server, condition):
    """Lets works be performed one by one until a condition holds, each after the page has shown all events so far."""
    job = server.service.jobs[page.url.split("#")[1]]
    while True:
        until(page, "id => document.getElementById('loop').dataset.event >= id", len(job.log.events) - 1)
        if page.evaluate(condition):
            return
        wait_until(lambda: gate.is_holding)
        gate.let_one()
        wait_until(lambda: gate.is_holding or job.result.done())


def ended(page):
    page.wait_for_selector("#loop:not([hidden])")
    until(page, "document.getElementById('activity').hidden && document.querySelector('#steps li')")
    until(page, "![...document.images].some((image) => image.classList.contains('loading'))")
    return page


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


def test_what_happens_is_shown_while_it_happens(open_page, gate, server):
    page = open_page()
    page.fill("#prompt", UNMET)  # the first image of this seed does not meet it
    page.fill("#seed", "1")
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


def test_markup_in_a_prompt_stays_text(open_page, http):
    page = open_page()
    page.fill("#prompt", _MARKUP)
    page.check("[value='one-shot']")
    page.click("#generate")
    ended(page)
    assert page.inner_text("#title") == _MARKUP
    assert page.locator("#entries .entry-prompt").first.inner_text() == _MARKUP
    assert page.locator("img[src='x']").count() == 0
    assert page.locator("script").count() == 1, "main.js"
    assert "hacked" not in page.title().split(" - ")[-1]
    page.reload()
    ended(page)
    assert page.inner_text("#title") == _MARKUP


def test_markup_of_models_stays_text_and_a_doubt_is_named(open_page):
    page = open_page()
    requirements = [
        {"text": _MARKUP, "met": False, "probability": 0.67, "evidence": _MARKUP},
        {"text": "blue dot", "met": False, "probability": 0.4, "evidence": ""},
        {"text": "green dot", "met": None, "probability": None, "evidence": "no answer"},
    ]
    verification = {"requirements": requirements, "description": _MARKUP, "verifier": _MARKUP}
    page.evaluate(
        """async (verification) => {
          const { checks, board } = await import("/page/verification.js");
          const { showTimeline } = await import("/page/timeline.js");
          const step = { number: 0, imageId: null, verification, rolledBack: false, references: [], nfe: 4, seconds: 1,
            attempts: 1, reasoning: verification.description };
          const list = document.createElement("ol");
          const state = { steps: [step], plans: [], best: null, status: "finished", outcome: null };
          showTimeline(list, null, state, () => []);
          document.getElementById("main").append(checks(verification),
            board([verification.requirements[0].text], [{ ...step, imageId: "i" }], 0), list);
        }""",
        verification,
    )
    rows = page.locator("#main > .checks tr").all_inner_texts()
    assert rows[0].split()[:2] == ["◐", "doubt"]
    assert rows[1].split()[:2] == ["○", "unmet"]
    assert rows[2].split()[:3] == ["?", "no", "answer"]
    assert page.inner_text("#main > .checks .legend").startswith("Doubt: more probably met than not")
    assert page.locator("#main > .board tbody td span[title]").first.get_attribute("title").startswith("doubt; ")
    assert page.locator("#main").inner_text().count(_MARKUP) >= 6
    assert page.locator("img[src='x'], #main script").count() == 0


def test_the_saved_page_shows_a_verification_in_the_same_form(open_page, server, loop_id):
    page = ended(open_page(f"/#{loop_id}"))
    checks = page.locator("#steps .checks").evaluate_all(f"(all) => all.map({_TREE})")
    table = page.locator("#board table").evaluate(_TREE)
    colors = page.locator("#steps .checks tr").evaluate_all(
        "(all) => all.map((row) => getComputedStyle(row).backgroundColor)"
    )
    page.goto((server.out / loop_id / "index.html").as_uri())
    assert len(checks) == 2
    assert page.locator(".steps .checks").evaluate_all(f"(all) => all.map({_TREE})") == checks
    assert page.locator(".board table").evaluate(_TREE) == table
    saved = page.locator(".steps .checks tr").evaluate_all(
        "(all) => all.map((row) => getComputedStyle(row).backgroundColor)"
    )
    assert saved == colors
    assert len(set(colors)) > 1


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


def test_one_shot_beside_the_loop_at_equal_nfe(open_page, http, loop_id):
    page = ended(open_page(f"/#{loop_id}"))
    page.click("text=One shot at 8 NFE")
    page.wait_for_selector("#compare:not([hidden])")
    newest = http.get("/v1/loops?limit=1").json()["data"][0]
    assert (newest["mode"], newest["nfe"], newest["prompt"], newest["seed"]) == ("one-shot", 8, UNMET, 1)
    assert page.inner_text("#compare .note") == "The loop took 8 NFE for 2 images, the one shot 8 NFE for one."
    left = page.locator("#compare img.left")
    assert left.get_attribute("alt") == "Left: One shot, 8 NFE"
    page.reload()
    ended(page)
    page.click("#toolbar >> text=Compare")
    page.wait_for_selector("#compare option:has-text('One shot, 8 NFE')", state="attached")


def test_the_png_holds_its_parameters_and_the_archive_the_trajectory(open_page, server, loop_id, tmp_path):
    page = ended(open_page(f"/#{loop_id}"))
    with page.expect_download() as download:
        page.click("text=Download PNG")
    assert re.fullmatch(r"two-red-circles-above-a-blue-square-1-image-[12]\.png", download.value.suggested_filename)
    download.value.save_as(tmp_path / "image.png")
    trajectory = server.service.store.trajectory(loop_id)
    with Image.open(tmp_path / "image.png") as image:
        image.load()
        parameters = json.loads(image.text["parameters"])
        assert np.array_equal(np.asarray(image), trajectory.image)
    assert (parameters["prompt"], parameters["seed"], parameters["max_steps"]) == (UNMET, 1, 2)
    assert (parameters["step"], parameters["loop"]) == (trajectory.best, loop_id)
    assert parameters["requirements"] == trajectory.verification.to_dict()["requirements"]
    with page.expect_download() as download:
        page.click("text=Trajectory")
    download.value.save_as(tmp_path / "loop.zip")
    with zipfile.ZipFile(tmp_path / "loop.zip") as archive:
        assert f"{loop_id}/trajectory.json" in archive.namelist()


def _drop(page, selector, files):
    """Drops files, as (name, type, base64), on an element."""
    page.evaluate(
        """([selector, files]) => {
          const transfer = new DataTransfer();
          for (const [name, type, content] of files) {
            const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
          }
          for (const kind of ["dragover", "drop"]) {
            document.querySelector(selector).dispatchEvent(
              new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
          }
        }""",
        [selector, files],
    )


def test_own_images_are_dropped_removed_and_sent(open_page, http, tmp_path):
    images = [encode_png(Image.fromarray(np.full((64, 64, 3), value, np.uint8))) for value in (40, 200)]
    encoded = [base64.b64encode(each).decode() for each in images]
    page = open_page()
    _drop(page, "#drop", [(f"{name}.png", "image/png", each) for name, each in zip("ab", encoded, strict=True)])
    until(page, "document.querySelectorAll('#own-images li').length === 2")
    _drop(page, "#drop", [("c.gif", "image/gif", encoded[0])])
    until(page, "document.getElementById('form-error').textContent.startsWith('c.gif: only PNG')")
    page.click("[aria-label='Remove a.png']")
    path = Path(tmp_path / "more.png")
    path.write_bytes(images[0])
    page.set_input_files("#files", path)
    until(page, "document.querySelectorAll('#own-images li').length === 2")
    page.fill("#prompt", PROMPT)
    page.check("[value='one-shot']")
    page.click("#generate")
    ended(page)
    page.wait_for_selector("#given:not([hidden])")
    sent = http.get(f"/v1/loops/{page.url.split('#')[1]}/input_images").json()["data"]
    assert [each["b64_json"] for each in sent] == [encoded[1], encoded[0]]
    assert page.locator("#given img").count() == 2


def test_history_is_searched_rerun_copied_and_deleted(open_page, http, server):
    prompt = "a green triangle left of a purple star"
    first = http.post("/v1/loops", json={"prompt": prompt, "mode": "one-shot", "seed": 5}).json()["id"]
    events_of(http, first)
    page = open_page()
    page.wait_for_selector("#entries li")
    page.fill("#search", "TRIANGLE purple")
    until(page, "document.querySelectorAll('#entries li').length === 1")
    page.hover("#entries li")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#entries >> text=Copy prompt")
    assert page.evaluate("navigator.clipboard.readText()") == prompt
    page.click("#entries >> text=Run again")
    page.wait_for_url("**/#loop_*")
    ended(page)
    again = page.url.split("#")[1]
    item = http.get(f"/v1/loops/{again}").json()
    assert (item["prompt"], item["mode"]) == (prompt, "one-shot")
    assert item["seed"] != 5
    until(page, "document.querySelectorAll('#entries li').length === 2")
    page.click("#toolbar >> text=Edit settings")
    until(page, "seed => document.getElementById('seed').value === seed", arg=str(item["seed"]))
    assert page.input_value("#prompt") == prompt
    page.click("#toolbar >> text=Delete")
    page.click("text=Really delete?")
    page.wait_for_selector("#welcome:not([hidden])")
    until(page, "document.querySelectorAll('#entries li').length === 1")
    assert http.get(f"/v1/loops/{again}").status_code == 404
    page.fill("#search", "no such words")
    page.wait_for_selector("text=No prompt has these words.")


def test_what_the_server_refuses_is_shown_at_the_field(open_page):
    page = open_page()
    page.click("#generate")
    assert page.inner_text("#form-error") == "Write a prompt first."
    assert page.evaluate("document.activeElement.id") == "prompt"


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


def test_the_downloaded_png_is_a_valid_file(open_page):
    """Text of any language, and a chunk whose checksum Pillow verifies."""
    page = open_page()
    png = encode_png(Image.fromarray(np.full((8, 8, 3), 7, np.uint8)))
    encoded = page.evaluate(
        """async (content) => {
          const { withText } = await import("/page/downloads.js");
          const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
          return btoa(String.fromCharCode(...withText(bytes, "parameters", "красный ✓")));
        }""",
        base64.b64encode(png).decode(),
    )
    content = base64.b64decode(encoded)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
    with Image.open(io.BytesIO(content)) as image:
        assert image.text["parameters"] == "красный ✓"
        assert np.array_equal(np.asarray(image), np.full((8, 8, 3), 7))


def test_limits_on_own_images(open_page):
    page = open_page()
    large = base64.b64encode(np.random.default_rng(0).bytes(LIMITS.max_body_bytes)).decode()
    _drop(page, "#drop", [("large.png", "image/png", large)])
    until(page, "document.getElementById('form-error').textContent.startsWith('large.png: all images')")
    assert page.locator("#own-images li").count() == 0
