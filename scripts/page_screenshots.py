"""Takes the screenshots of docs/how-to/serving.md: a finished loop, a running one, a branch, a comparison in dark mode.

    clvr serve --model shapes-tiny --port 8000 --out out/serve
    python scripts/page_screenshots.py --url http://127.0.0.1:8000/ --out docs/how-to/serving

It needs Chromium and Playwright (extra `test`), and a server without a key.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.serving.page.browser import chromium

PROMPT = (
    "a red star at the top left, a blue circle at the top right, a green square in the center, "
    "a yellow triangle at the bottom left, and a purple cross at the bottom right"
)
MAX_BYTES = 150_000
_MINUTES = 10 * 60_000


def main() -> None:
    """Writes page.webp, page-narrow.webp, page-branch.webp and page-dark.webp."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/", help="Address of the page.")
    parser.add_argument("--out", type=Path, default=Path("docs/how-to/serving"), help="Directory for the images.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the loop.")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        narrow = _opened(browser, arguments.url, 360, 1150, "light", 2)
        _start(narrow, arguments.seed)
        narrow.locator("#steps li.pending .shimmer").nth(0).wait_for()
        narrow.wait_for_selector("#steps .checks")
        narrow.locator("#overline").scroll_into_view_if_needed()
        narrow.evaluate("scrollTo(0, document.getElementById('main').offsetTop)")
        _save(narrow, arguments.out / "page-narrow.webp")
        _wait_for_end(narrow)
        address = narrow.url

        wide = _opened(browser, address, 1360, 1180, "light", 1.5)
        _wait_for_end(wide)
        _save(wide, arguments.out / "page.webp")
        wide.locator("text=Branch from image").first.click()
        wide.fill("#edit-instruction", "Add a small orange star below the green square.")
        _save(wide, arguments.out / "page-branch.webp")

        dark = _opened(browser, address, 1360, 900, "dark", 1.5)
        _wait_for_end(dark)
        dark.locator("#toolbar button", has_text="One shot at").click()
        dark.wait_for_selector("#compare:not([hidden]) img.crisp", timeout=_MINUTES)
        dark.evaluate("document.getElementById('compare').scrollIntoView({ block: 'center' })")
        _save(dark, arguments.out / "page-dark.webp")


def _opened(browser: Any, url: str, width: int, height: int, color_scheme: str, scale: float) -> Any:
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme=color_scheme,
        device_scale_factor=scale,
        locale="en-US",
        reduced_motion="reduce",
    )
    page.set_default_timeout(_MINUTES)
    page.goto(url)
    page.wait_for_selector("body[data-is-ready]")
    return page


def _start(page: Any, seed: int) -> None:
    page.fill("#prompt", PROMPT)
    page.fill("#seed", str(seed))
    page.click("#generate")
    page.wait_for_url("**/#loop_*")


def _wait_for_end(page: Any) -> None:
    page.wait_for_selector("#activity", state="hidden")
    page.wait_for_selector("#toolbar >> text=Run again")
    page.wait_for_timeout(1500)  # until images are drawn


def _save(page: Any, path: Path) -> None:
    """Saves what is in view, as WebP of at most MAX_BYTES."""
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for quality in range(90, 30, -5):
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=quality, method=6)
        if buffer.tell() <= MAX_BYTES:
            break
    path.write_bytes(buffer.getvalue())
    print(f"{path}: {image.width} x {image.height}, {buffer.tell():,} bytes, quality {quality}")


if __name__ == "__main__":
    main()
