"""The page's files and endpoints, without a browser."""

import asyncio
import base64
import io
import posixpath
import re
import zipfile
from importlib import resources
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from clvr_jax.files.image_io import encode_png
from clvr_jax.serving.app import make_app
from tests.serving.api.test_loops import events_of
from tests.serving.conftest import KEY, PROMPT

LOOP = {"prompt": PROMPT, "seed": 1, "max_steps": 1}


@pytest.fixture(scope="module")
def loop_id(server):
    with server.client() as client:
        found = client.post("/v1/loops", json=LOOP).json()["id"]
        events_of(client, found)
    return found


def test_the_page_needs_no_key_and_holds_none(server):
    with server.client(key=None) as anybody:
        page = anybody.get("/")
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert 'data-needs-key="true"' in page.text
        names = re.findall(r'(?:src|href)="/page/([^"]+)"', page.text)
        assert {"main.js", "app.css", "trajectory.css", "icon.svg"} <= set(names)
        modules, read = {"main.js"}, set()
        while new := modules - read:
            for name in new:
                read.add(name)
                text = anybody.get(f"/page/{name}").text
                modules |= {
                    posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
                    for path in re.findall(r'from "(\.[^"]+)"', text)
                }
        texts = [anybody.get(f"/page/{name}") for name in {*names, *modules}]
        assert {"dom.js", "texts.js", "loop/loop_view.js", "loop/verification.js"} <= modules
        for answer in (page, *texts):
            assert answer.status_code == 200, answer.url
            assert KEY not in answer.text
        assert anybody.get("/v1/server").status_code == 401
        assert anybody.get("/v1/loops").status_code == 401


def test_nothing_of_another_origin_and_nothing_inline_is_allowed(http):
    page = http.get("/")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["img-src"] == "'self' data: blob:"
    assert {policy[name] for name in ("object-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert not policy.keys() & {"script-src", "style-src", "connect-src"}, "would widen default-src"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert http.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", page.text)


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/index.html", "/page/..%2f__init__.py", "/page/loop", "/page/a/b.js"]
)
def test_no_other_file_is_sent(http, path):
    answer = http.get(path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_no_module_makes_markup_of_text():
    """The page inserts texts as text nodes; a function that parses markup would open it to prompts and replies."""
    modules = list(Path(str(resources.files("clvr_jax.serving").joinpath("page"))).rglob("*.js"))
    assert len(modules) > 10
    for module in modules:
        banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|\beval\(|new Function"
        assert not re.search(banned, module.read_text(encoding="utf-8")), module.name


def test_the_server_describes_itself(http, server):
    found = http.get("/v1/server").json()
    assert (found["model"], found["modes"], found["default_size"]) == ("shapes-tiny", ["loop", "one-shot"], "64x64")
    assert (found["num_inference_steps"], found["nfe_per_step"]) == (4, 1)
    assert found["limits"]["max_body_bytes"] == server.service.limits.max_body_bytes
    for name, value in (("max_steps", found["limits"]["max_steps"]), ("candidates", found["limits"]["max_candidates"])):
        answer = http.post("/v1/loops", json={"prompt": PROMPT, name: value + 1})
        assert answer.json()["error"]["param"] == name


def test_the_archive_is_the_saved_trajectory(http, server, loop_id):
    answer = http.get(f"/v1/loops/{loop_id}/archive")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    assert answer.headers["content-disposition"] == f'attachment; filename="{loop_id}.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    directory = server.out / loop_id
    assert files == {f"{loop_id}/{path.name}": path.read_bytes() for path in directory.iterdir()}
    assert {f"{loop_id}/trajectory.json", f"{loop_id}/index.html", f"{loop_id}/step_00.png"} <= files.keys()


@pytest.mark.parametrize("name", ["archive", "input_images"])
@pytest.mark.parametrize("unknown", ["loop_" + "0" * 24, "x", ".."])
def test_files_of_an_unknown_loop(http, name, unknown):
    assert http.get(f"/v1/loops/{unknown}/{name}").status_code == 404


@pytest.mark.slow
def test_input_images_are_those_of_the_request(http, server):
    image = encode_png(Image.fromarray(np.full((32, 48, 3), 90, np.uint8)))
    encoded = base64.b64encode(image).decode()
    body = {"prompt": PROMPT, "mode": "one-shot", "images": [encoded], "seed": 1}
    with_image = http.post("/v1/loops", json=body).json()["id"]
    running = http.get(f"/v1/loops/{with_image}/input_images").json()["data"]
    events_of(http, with_image)
    stored = http.get(f"/v1/loops/{with_image}/input_images").json()["data"]
    assert running == stored == [{"b64_json": encoded}]


@pytest.mark.slow
def test_history_is_searched_by_all_words_in_any_case(http, loop_id):
    def found(query):
        answer = http.get("/v1/loops", params={"query": query, "limit": 100})
        assert answer.status_code == 200
        return loop_id in [each["id"] for each in answer.json()["data"]]

    assert found("CIRCLE red")
    assert not found("red triangle")
    assert not found("red_circle%")
    assert found("")
    assert http.get("/v1/loops", params={"query": "x" * 201}).status_code == 422


@pytest.mark.slow
def test_history_pages_keep_to_the_search(http, loop_id):
    ids, before = [], None
    while True:
        params = {"query": "circle", "limit": 1, **({"before": before} if before else {})}
        page = http.get("/v1/loops", params=params).json()
        ids += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        before = ids[-1]
    assert loop_id in ids
    assert len(set(ids)) == len(ids)


def test_the_page_of_a_server_without_key_says_so(server):
    async def index():
        transport = httpx2.ASGITransport(app=make_app(server.service, None))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/")).text

    assert 'data-needs-key="false"' in asyncio.run(index())
