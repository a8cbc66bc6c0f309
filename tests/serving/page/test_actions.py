"""What can be done with the form, the history and a finished loop."""

import base64
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.files.image_io import encode_png
from tests.serving.api.test_loops import events_of
from tests.serving.conftest import LIMITS, PROMPT
from tests.serving.page.helpers import UNMET, ended, until


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_downloaded_png_is_a_valid_file(open_page):
    """Text of any language, and a chunk whose checksum Pillow verifies."""
    page = open_page()
    png = encode_png(Image.fromarray(np.full((8, 8, 3), 7, np.uint8)))
    encoded = page.evaluate(
        """async (content) => {
          const { withText } = await import("/page/loop/downloads.js");
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
