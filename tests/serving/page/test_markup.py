"""Texts of users and models stay texts."""

import pytest

from tests.serving.page.helpers import ended

_MARKUP = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script> a red circle"


@pytest.mark.slow
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
          const { checks, board } = await import("/page/loop/verification.js");
          const { showTimeline } = await import("/page/loop/timeline.js");
          const step = { number: 0, imageId: null, verification, rolledBack: false, references: [], nfe: 4, seconds: 1,
            attempts: 1, reasoning: verification.description };
          const list = document.createElement("ol");
          const state = { steps: [step], plans: [], edits: [], inherited: 0, best: null, status: "finished",
            outcome: null };
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
    assert page.inner_text("#main > .checks .legend").startswith("Doubt: described as met")
    assert page.locator("#main > .board tbody td span[title]").first.get_attribute("title").startswith("doubt; ")
    assert page.locator("#main").inner_text().count(_MARKUP) >= 6
    assert page.locator("img[src='x'], #main script").count() == 0
