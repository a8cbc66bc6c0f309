"""A trajectory as one self-contained HTML page: inline style, embedded pictures, no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from clvr_jax.reasoning.actions import plan_items, unmet_span
from clvr_jax.reasoning.images import Picture, encode_png, pixels

if TYPE_CHECKING:
    from clvr_jax.reasoning.trajectory import Step, Trajectory
    from clvr_jax.reasoning.verification import Requirement, Verification

_OUTCOME_NOTES = {
    "accepted": "The verification found every requirement met.",
    "gave up": "The controller stopped although not everything is met.",
    "step limit": "The budget of steps is spent; this is the best picture so far.",
    "nfe limit": "The budget of network evaluations is spent; this is the best picture so far.",
    "time limit": "The time is up; this is the best picture so far.",
    "unparseable": "The controller's reply could not be read, which never counts as an accept.",
    "unverified": "The controller stopped; nothing was verified.",
}
_ACCEPTED_BY_CONTROLLER = "The controller looked at the last picture and found nothing unmet."
"""The note of an accepted trajectory without a separate verification."""
_SMALL = 128  # pictures up to this side are enlarged by whole pixels
_STEP_WIDTH, _RESULT_WIDTH = 220, 380
_LONG_PROMPT = 140


def render(trajectory: Trajectory) -> str:
    """The page as HTML text. Everything that comes from models or users is escaped."""
    template = Template(resources.files("clvr_jax.reasoning").joinpath("page.html").read_text(encoding="utf-8"))
    steps = trajectory.steps
    items = _items(steps)
    note = _OUTCOME_NOTES[trajectory.outcome]
    if trajectory.outcome == "accepted" and trajectory.verification is None:
        note = _ACCEPTED_BY_CONTROLLER
    if trajectory.error:
        note += f" {trajectory.error}"
    rows = [_step(trajectory, number, items) for number in range(len(steps))]
    versions = ", ".join(f"{name} {version}" for name, version in trajectory.versions.items())
    return template.substitute(
        title=escape(_shorten(trajectory.prompt, 70)),
        outcome=escape(trajectory.outcome),
        outcome_class="good" if trajectory.outcome == "accepted" else "open",
        outcome_note=escape(note),
        prompt=escape(trajectory.prompt),
        headline_class=' class="long"' if len(trajectory.prompt) > _LONG_PROMPT else "",
        facts=_facts(trajectory),
        picture=_result(trajectory),
        board=_board(trajectory, items),
        steps="\n".join(rows),
        footer=escape(versions),
    )


def _items(steps: Sequence[Step]) -> dict[str, int]:
    """What the board lists -> the first step at which it is known.

    Where a step has a verification these are the requirements, in their order. Else they are the items of the plan,
    known from step 0, and those that a verdict names later.
    """
    items: dict[str, int] = {}
    if _is_verified(steps):
        for number, step in enumerate(steps):
            for requirement in step.verification.requirements if step.verification else ():
                items.setdefault(requirement.text, number)
        return items
    items = dict.fromkeys(plan_items(steps[0].reasoning), 0) if steps else {}
    for number, step in enumerate(steps):
        for item in step.unmet or ():
            items.setdefault(item, number)
    return items


def _is_verified(steps: Sequence[Step]) -> bool:
    return any(step.verification is not None for step in steps)


def _facts(trajectory: Trajectory) -> str:
    dropped = sum(step.rolled_back for step in trajectory.drawings)
    pictures = str(len(trajectory.drawings)) + (f" ({dropped} rolled back)" if dropped else "")
    facts = {
        "Model": trajectory.model or "not recorded",
        "Pictures": pictures,
        "Network evaluations": str(trajectory.nfe),
        "Time": _seconds(trajectory.seconds),
        "Seed": str(trajectory.seed),
    }
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())


def _result(trajectory: Trajectory) -> str:
    if trajectory.best is None or trajectory.image is None:
        return '<p class="blank">No picture was drawn.</p>'
    caption = f"Picture {trajectory.best + 1} of {len(trajectory.drawings)}"
    if (count := _unmet_count(trajectory.steps[trajectory.best])) is not None:
        caption += f", {count}"
    return (
        f'<div class="mat">{_img(trajectory.image, _RESULT_WIDTH, f"The result: {caption}")}</div>'
        f"<figcaption>{escape(caption)}</figcaption>"
    )


def _board(trajectory: Trajectory, items: dict[str, int]) -> str:
    """The requirements or the checklist over all images as a table: one row an item, one column an image."""
    columns = [(number, step) for number, step in enumerate(trajectory.steps) if step.image is not None]
    if not items or not columns:
        return ""
    is_verified = _is_verified(trajectory.steps)
    styles = {
        number: " ".join(
            name for name, holds in (("dropped", step.rolled_back), ("final", number == trajectory.best)) if holds
        )
        for number, step in columns
    }
    head = "".join(f'<th scope="col" class="{styles[number]}">{number + 1}</th>' for number, _ in columns)
    mark = _requirement_mark if is_verified else _mark
    body = "".join(
        f'<tr><th scope="row">{escape(item)}</th>'
        + "".join(f'<td class="{styles[number]}">{mark(step, item, number < first)}</td>' for number, step in columns)
        + "</tr>"
        for item, first in items.items()
    )
    feet = {"unmet": _unmet_number}
    if is_verified:
        feet["met, expected"] = _expected_number
    foot = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(f'<td class="{styles[number]}">{value(step)}</td>' for number, step in columns)
        + "</tr>"
        for name, value in feet.items()
    )
    title, style = ("Requirements", "board verified") if is_verified else ("Checklist", "board")
    return (
        f'<h2>{title}</h2><div class="{style}"><table>'
        f'<thead><tr><th scope="col">Picture</th>{head}</tr></thead><tbody>{body}</tbody>'
        f"<tfoot>{foot}</tfoot></table></div>"
    )


def _unmet_number(step: Step) -> str:
    return "?" if step.unmet is None else str(len(step.unmet))


def _expected_number(step: Step) -> str:
    """The expected number of met requirements."""
    return "?" if step.verification is None or step.score is None else f"{step.score:.2f}"


def _mark(step: Step, item: str, before_known: bool) -> str:
    if step.unmet is None or before_known:
        return '<span class="none" title="not judged">·</span>'
    if item in step.unmet:
        return '<span class="unmet" title="unmet">○</span>'
    return '<span class="met" title="met">✓</span>'


def _requirement_mark(step: Step, item: str, _: bool) -> str:
    """Met or unmet, the probability as a number and a bar, and the evidence as a tooltip."""
    found = [each for each in step.verification.requirements if each.text == item] if step.verification else []
    if not found:
        return '<span class="none" title="not verified">·</span>'
    (state, sign), requirement = _state(found[0]), found[0]
    tip = f"{state}; {_probability(requirement)}" + (f"; {requirement.evidence}" if requirement.evidence else "")
    style = "met" if requirement.met else "unmet"
    return f'<span class="{style}" title="{escape(tip)}">{sign}{_bar(requirement)}</span>'


def _state(requirement: Requirement) -> tuple[str, str]:
    """What was found out about a requirement: in words, and as a sign."""
    if requirement.met is None:
        return "no answer", "?"
    return ("met", "✓") if requirement.met else ("unmet", "○")


def _probability(requirement: Requirement) -> str:
    value = requirement.probability
    return "no probability" if value is None else f"probability of being met {_number(value)}"


def _number(probability: float) -> str:
    """Two digits; what is not quite 0 or 1 is not shown as if it were."""
    text = f"{probability:.2f}"
    if text == "0.00" and probability > 0:
        return "<0.01"
    return ">0.99" if text == "1.00" and probability < 1 else text


def _bar(requirement: Requirement) -> str:
    """The probability as a number above a bar; nothing if there is none."""
    value = requirement.probability
    if value is None:
        return ""
    return (
        f" <span>{escape(_number(value))}</span>"
        f'<span class="bar" aria-hidden="true"><span style="width:{100 * value:.0f}%"></span></span>'
    )


def _step(trajectory: Trajectory, number: int, items: dict[str, int]) -> str:
    step = trajectory.steps[number]
    says = f'<p class="says">{_reasoning(step.reasoning)}</p>'
    if step.image is None:
        accepted = trajectory.outcome == "accepted"
        return (
            f'<li class="stop{" accepted" if accepted else ""}"><span class="number">{"✓" if accepted else "■"}</span>'
            f'<div class="head"><strong>{"Accepted" if accepted else "Stopped"}</strong>{_attempts(step)}</div>'
            f"{says}{_price(step)}</li>"
        )
    badges = _attempts(step)
    if number == trajectory.best:
        badges += '<span class="badge">result</span>'
    count = _unmet_count(step)
    if count is not None:
        is_open = step.unmet or (step.verification is not None and not step.verification.accepted)
        badges = f'<span class="badge {"open" if is_open else "good"}">{count}</span>{badges}'
    if step.redraw:
        badges += f'<span class="badge">drawn again ({step.redraw})</span>'
    if step.rolled_back:
        badges += '<span class="badge">rolled back</span>'
    alt = f"Picture {number + 1}" + (f", {count}" if count is not None else "")
    if step.verification is not None:
        checks = _verification(trajectory.steps, number, step.verification)
    else:
        checks = "" if _is_verified(trajectory.steps) else _checklist(trajectory.steps, number, items)
    return (
        f'<li class="{"rolled" if step.rolled_back else "kept"}"><span class="number">{number + 1}</span>'
        f'<div class="step"><div class="mat">{_img(step.image, _STEP_WIDTH, alt)}</div><div>'
        f'<div class="head">{badges}</div>{says}{checks}{_price(step)}'
        "</div></div></li>"
    )


def _reasoning(text: str) -> str:
    """Reasoning with its verdict sentence and what comes before set back: what remains is what to draw."""
    span = unmet_span(text)
    if span is None:
        return escape(text)
    return f'<span class="aside">{escape(text[: span[1]])}</span>{escape(text[span[1] :])}'


def _checklist(steps: Sequence[Step], number: int, items: dict[str, int]) -> str:
    """What this picture lacks, and what it has gained over the picture it was made from."""
    step = steps[number]
    if step.unmet is None or not items:
        return ""
    source = steps[step.references[-1]].unmet if step.references else None
    entries = [f'<li class="unmet">○ {escape(item)}</li>' for item in dict.fromkeys(step.unmet)]
    for item, first in items.items():
        if item in step.unmet or first > number:
            continue
        gained = " just" if source is None or item in source else ""
        entries.append(f'<li class="met{gained}">✓ {escape(item)}</li>')
    return f'<ul class="list" aria-label="Checklist">{"".join(entries)}</ul>'


def _verification(steps: Sequence[Step], number: int, verification: Verification) -> str:
    """The verification of one image: requirement by requirement, on what description, and by whom."""
    references = steps[number].references
    before = steps[references[-1]].verification if references else None
    unmet_before = None if before is None else before.unmet
    rows = []
    for requirement in verification.requirements:
        state, sign = _state(requirement)
        gained = requirement.met and (unmet_before is None or requirement.text in unmet_before)
        evidence = f'<p class="evidence">{escape(requirement.evidence)}</p>' if requirement.evidence else ""
        bar = _bar(requirement) or '<span class="none">no probability</span>'
        rows.append(
            f'<tr class="{"met" if requirement.met else "unmet"}{" just" if gained else ""}">'
            f'<td class="state">{sign} {state}</td>'
            f'<th scope="row">{escape(requirement.text)}{evidence}</th><td class="probability">{bar}</td></tr>'
        )
    if rows:
        table = f"<table><tbody>{''.join(rows)}</tbody></table>"
    else:
        table = "<p>The prompt asks for nothing that can be checked.</p>"
    description = (
        f'<p class="description"><b>Description</b> {escape(verification.description)}</p>'
        if verification.description
        else ""
    )
    verifier = f'<p class="verifier"><b>Verified by</b> {escape(verification.verifier or "not recorded")}</p>'
    return f'<div class="checks" role="group" aria-label="Verification">{table}{description}{verifier}</div>'


def _attempts(step: Step) -> str:
    return "" if step.attempts == 1 else f'<span class="badge">readable at attempt {step.attempts}</span>'


def _price(step: Step) -> str:
    parts = [_seconds(step.seconds)]
    if step.image is not None:
        parts.insert(0, f"{step.nfe} NFE")
        if step.references:
            parts.append("made from " + ", ".join(str(reference + 1) for reference in step.references))
        if step.seed is not None:
            parts.append(f"seed {step.seed}")
    return f'<p class="price">{"".join(f"<span>{part}</span>" for part in parts)}</p>'


def _img(picture: Picture, width: int, alt: str) -> str:
    """The picture as an embedded PNG: a small one enlarged by a whole factor to about `width` pixels, others as is."""
    height_px, width_px = pixels(picture).shape[:2]
    small = max(height_px, width_px) <= _SMALL
    factor = max(1, round(width / width_px)) if small else 1
    data = base64.b64encode(encode_png(picture)).decode()
    return (
        f'<img{" class=crisp" if small else ""} width="{width_px * factor}" height="{height_px * factor}" '
        f'alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    )


def _unmet_count(step: Step) -> str | None:
    """How many things the image lacks, in words; None if nobody looked."""
    if step.unmet is None:
        return None
    if step.verification is not None and not step.verification.requirements:
        return "nothing to check"
    return f"{len(step.unmet)} unmet" if step.unmet else "nothing unmet"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _shorten(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
