"""What tests of the page share: prompts, sizes, and waiting for what the page shows."""

from tests.serving.conftest import wait_until

SECONDS = 300
"""How long to wait for what takes a second on an idle machine."""
SIZES = {"wide": (1280, 900), "narrow": (360, 740)}
UNMET = "two red circles above a blue square"
"""A prompt that the first image of seed 1 does not meet."""
TREE = """(root) => {
  const text = (node) => node.data.replace(/\\s+/g, " ").trim();
  const style = (node) => (node.getAttribute("style") ?? "").replace(/[ ;]/g, "");
  const tree = (node) => node.nodeType === Node.TEXT_NODE ? text(node)
    : [node.localName, node.className, style(node), ...[...node.childNodes].map(tree).filter((each) => each !== "")];
  return JSON.stringify(tree(root));
}"""
"""An element as a tree of names, classes, styles and texts, without white space that is not shown."""


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
