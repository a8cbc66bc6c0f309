"""A real headless Chromium that opens the page, with the shipped model behind it."""

import pytest

from tests.serving.api.test_loops import events_of
from tests.serving.conftest import KEY
from tests.serving.page.browser import chromium
from tests.serving.page.helpers import SIZES, UNMET


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def open_page(browser, server):
    """Opens the page with the key; at the end no error may be on the console but those in `expected`."""
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

    opened.expected = []
    yield opened
    for context in contexts:
        context.close()
    assert problems == opened.expected


@pytest.fixture(scope="package")
def loop_id(server):
    """A finished loop with several images."""
    with server.client() as client:
        found = client.post("/v1/loops", json={"prompt": UNMET, "seed": 1, "max_steps": 2}).json()["id"]
        events_of(client, found)
        assert client.get(f"/v1/loops/{found}").json()["images"] == 2
    return found
