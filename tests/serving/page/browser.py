"""A real headless Chromium for tests of the page, or a clear reason why there is none."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Any]:
    """Yields a started Chromium; skips the test without one, and fails it if CLVR_REQUIRE_BROWSER is 1, as in CI."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        _refuse("Playwright is not installed: pip install 'clvr-jax[test]'")
    if program is None:
        _refuse("there is no Chromium: apt-get install chromium")
    arguments = [*_ARGUMENTS, *(["--no-sandbox"] if os.getuid() == 0 else [])]  # Chromium needs it for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


def violations(page: Any) -> list[str]:
    """Returns what axe-core finds wrong with the accessibility of a page, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:200]} ({node['failureSummary']})" for each in found for node in each["nodes"]
    ]


def _refuse(reason: str) -> None:
    if os.environ.get("CLVR_REQUIRE_BROWSER") == "1":
        pytest.fail(f"CLVR_REQUIRE_BROWSER is set, but {reason}")
    pytest.skip(reason)
