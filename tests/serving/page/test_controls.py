"""The user changes a loop from the page: plan, next instruction, rollback, branches; and the denoising bar."""

import pytest

from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from tests.serving.conftest import wait_until
from tests.serving.page.browser import violations
from tests.serving.page.helpers import TREE, UNMET, advance, ended, until

REQUIREMENTS = ["a red circle", "a blue star"]
INSTRUCTION = "Draw a red circle."
REFUSED = "Failed to load resource: the server responded with a status of 422 (Unprocessable Entity)"
"""What Chromium writes to the console when the server refuses the text of a dialog."""

REOPEN = """async () => {
  const dialog = document.getElementById("edit-dialog");
  dialog.close();
  [...document.querySelectorAll("button")].find((each) => each.textContent === "Branch from image 2").click();
  await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
}"""
"""Opens the dialog again before the browser reports that it was closed, as quick keys do on a slow machine."""


def started(page, **fields):
    page.fill("#prompt", UNMET)
    page.fill("#seed", "1")
    for name, value in fields.items():
        page.evaluate("([name, value]) => { document.getElementById(name).value = value; }", [name, str(value)])
    page.click("#generate")
    page.wait_for_url("**/#loop_*")
    return page.url.split("#")[1]


def let_change(gate, server):
    """Ends the work that runs, after which the change that waits takes effect."""
    wait_until(lambda: server.service.scheduler._changes)
    wait_until(lambda: gate.is_holding)
    gate.let_one()


def edits_of(page):
    return page.locator(".steps > .edit").evaluate_all(f"(all) => all.map({TREE})")


@pytest.mark.slow
def test_plan_rollback_and_branch_while_the_loop_runs(open_page, gate, http, server):
    page = open_page()
    open_page.expected.append(REFUSED)
    loop_id = started(page, max_steps=3)
    advance(page, gate, server, "document.querySelector('#board tbody th')")
    derived = page.locator("#board tbody th").all_inner_texts()

    # Keys alone: the dialog opens on its first field, refuses what cannot be read, and closes when the change is made.
    page.focus("#toolbar >> text=Edit plan")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "edit-requirements"
    assert page.input_value("#edit-requirements").splitlines() == derived
    assert violations(page) == []
    page.fill("#edit-requirements", "a red circle; a blue star")
    page.keyboard.press("Tab")
    page.keyboard.type(INSTRUCTION)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "edit-apply"
    page.keyboard.press("Enter")
    until(page, "document.getElementById('edit-error').textContent.startsWith('requirements: number 1 must be')")
    assert page.get_attribute("#edit-requirements", "aria-invalid") == "true"
    assert page.locator("#board tbody th").all_inner_texts() == derived
    page.fill("#edit-requirements", "\n".join(REQUIREMENTS))
    page.focus("#edit-apply")
    page.keyboard.press("Enter")
    let_change(gate, server)
    page.wait_for_selector("#edit-dialog", state="hidden")
    until(page, "document.querySelector('.steps > .edit')")
    assert page.locator("#board tbody th").all_inner_texts() == REQUIREMENTS
    assert page.inner_text("#announcer") == "The plan is changed."

    # The instruction takes the place of the plan, and the verification uses the new requirements.
    advance(page, gate, server, "document.querySelector('#steps .checks')")
    first = page.locator("#steps > .kept").first
    assert first.locator(".says").inner_text() == INSTRUCTION
    assert "instruction of the user" in first.locator(".head").inner_text()
    rows = first.locator(".checks th").evaluate_all("(all) => all.map((each) => each.firstChild.data)")
    assert rows == REQUIREMENTS
    advance(page, gate, server, "document.getElementById('activity-text').textContent.startsWith('Generating image 2')")
    assert violations(page) == []

    # Back to image 1 while image 2 is generated, which is dropped.
    page.click("text=Roll back to image 1")
    until(page, "document.getElementById('activity-text').textContent.startsWith('Returning to image 1')")
    let_change(gate, server)
    until(page, "document.querySelector('#steps > .rolled')")
    until(page, "document.querySelectorAll('.steps > .edit').length === 2")
    assert page.inner_text("#announcer") == "The loop has returned to image 1."
    titles = page.locator(".steps > .edit strong").all_inner_texts()
    assert titles == ["Plan changed", "Returned to image 1"]

    # A branch from image 1 while the loop still runs.
    page.click("text=Branch from image 1")
    assert page.input_value("#edit-prompt") == UNMET
    page.fill("#edit-instruction", "Add a blue star.")
    page.fill("#edit-seed", "3")
    page.click("#edit-apply")
    until(page, "id => location.hash.startsWith('#loop_') && location.hash !== '#' + id", loop_id)
    until(page, "id => document.querySelector('#parent a')?.hash === '#' + id", loop_id)
    branch_id = page.url.split("#")[1]
    assert page.inner_text("#parent") == f"Branch of {loop_id} from image 1"
    gate.is_open = True
    ended(page)
    item = http.get(f"/v1/loops/{branch_id}").json()
    assert (item["seed"], item["parent"]) == (3, {"id": loop_id, "step": 0})
    assert "of the loop before" in page.locator("#steps > .kept .head").first.inner_text()
    assert page.locator("#steps .says").nth(1).inner_text() == item["steps"][1]["reasoning"] == "Add a blue star."
    of_branch = edits_of(page)

    page.click("#parent a")
    until(page, "id => location.hash === '#' + id && document.getElementById('parent').hidden", loop_id)
    ended(page)
    wait_until(lambda: not server.service.jobs)
    stored = Trajectory.load(server.out / loop_id)
    assert [(edit.requirements, edit.instruction, edit.rollback_to) for edit in stored.edits] == [
        (tuple(REQUIREMENTS), INSTRUCTION, None),
        (None, None, 0),
    ]
    assert stored.steps[1].rolled_back
    assert [step.references for step in stored.generated[2:3]] == [(0,)]
    assert {tuple(each.text for each in step.verification.requirements) for step in stored.generated} == {
        tuple(REQUIREMENTS)
    }
    assert page.locator("#steps > .rolled").count() == sum(step.rolled_back for step in stored.steps)

    # The saved pages show the same edits in the same form, and the parent.
    shown = edits_of(page)
    assert len(shown) == 2
    page.goto((server.out / loop_id / "index.html").as_uri())
    assert edits_of(page) == shown
    assert violations(page) == []
    page.goto((server.out / branch_id / "index.html").as_uri())
    assert edits_of(page) == of_branch
    assert page.inner_text(".parent") == f"Branch of {loop_id} from image 1"


@pytest.mark.slow
def test_keys_alone_branch_off_from_a_loop_that_has_ended(open_page, http, loop_id):
    page = ended(open_page(f"/#{loop_id}", size="narrow"))
    assert page.locator("text=Roll back to image").count() == 0
    assert page.locator("#toolbar >> text=Edit plan").count() == 0
    page.focus("text=Branch from image 2")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "edit-prompt"
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.wait_for_selector("#edit-dialog", state="hidden")
    assert page.evaluate("document.activeElement.textContent") == "Branch from image 2"
    page.keyboard.press("Enter")
    page.evaluate(REOPEN)
    page.keyboard.press("Control+A")
    page.keyboard.type("a green square")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    until(page, "id => location.hash !== '#' + id", loop_id)
    ended(page)
    assert page.inner_text("#title") == "a green square"
    item = http.get(f"/v1/loops/{page.url.split('#')[1]}").json()
    assert (item["prompt"], item["parent"]) == ("a green square", {"id": loop_id, "step": 1})


@pytest.mark.slow
@pytest.mark.parametrize(("action", "outcome"), [("Accept now", "stopped"), ("Cancel", "canceled")])
def test_the_denoising_bar_moves_and_the_loop_ends_in_the_middle(open_page, http, held_step, action, outcome):
    page = open_page()
    loop_id = started(page, candidates=2, max_nfe=3)  # with a limit on NFE the second candidate is a work of its own
    assert held_step.reached.wait(300)
    until(
        page, "document.querySelector('.pending [role=progressbar]')?.getAttribute('aria-valuetext') === 'step 2 of 4'"
    )
    assert page.inner_text("#activity-text") == "Generating image 2, denoising step 2 of 4"
    assert page.evaluate("document.querySelector('.denoising > span').style.width") == "50%"
    with page.expect_response(f"**/{loop_id}/*"):
        page.click(f"#toolbar >> text={action}")
    held_step.released.set()
    ended(page)
    item = http.get(f"/v1/loops/{loop_id}").json()
    assert (item["images"], item["best"], item["outcome"]) == (1, 0, outcome)
    assert page.locator("#steps .mat img").count() == 1


def test_the_limit_of_network_evaluations_counts_with_the_chosen_steps(open_page, gate, http):
    page = open_page()
    assert page.inner_text("#max_nfe-value") == "no limit"
    page.locator("#max_nfe").fill("3")
    assert page.inner_text("#max_nfe-value") == "12"  # 4 steps are the model's own
    page.click("text=More settings")
    page.fill("#num_inference_steps", "10")
    assert page.inner_text("#max_nfe-value") == "30"
    assert page.get_attribute("#max_nfe", "aria-valuetext") == "30 NFE"
    loop_id = started(page)
    assert http.get(f"/v1/loops/{loop_id}").json()["request"]["max_nfe"] == 30
    page.click("#toolbar >> text=Cancel")
    gate.is_open = True
    page.click("text=Edit settings")
    assert (page.input_value("#num_inference_steps"), page.inner_text("#max_nfe-value")) == ("10", "30")
