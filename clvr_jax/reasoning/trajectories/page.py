"""A trajectory as one self-contained HTML page: inline style, embedded images, no script, no network.

This module computes the values that the page shows; the template page.html lays them out and escapes them. The page of
`clvr serve` shows verifications in the same form and with the same style, page.css.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clvr_jax.display.html_pages import read_text, render_page
from clvr_jax.files.image_io import ImageLike, encode_png, pixels
from clvr_jax.files.json_input import JSON
from clvr_jax.reasoning.conversation.actions import plan_items, unmet_span
from clvr_jax.reasoning.verification.verification import DOUBT_NOTE

if TYPE_CHECKING:
    from clvr_jax.reasoning.trajectories.trajectory import Step, Trajectory
    from clvr_jax.reasoning.verification.verification import Requirement, Verification

_OUTCOME_NOTES = {
    "accepted": "The verification found every requirement met.",
    "gave up": "The controller stopped although not everything is met.",
    "step limit": "The budget of steps is spent; this is the best image so far.",
    "nfe limit": "The budget of network evaluations is spent; this is the best image so far.",
    "time limit": "The time is up; this is the best image so far.",
    "unparseable": "The controller's reply could not be read, which never counts as an accept.",
    "unverified": "The controller stopped; nothing was verified.",
    "stopped": "The user stopped the loop; this is the best image so far.",
    "canceled": "The user canceled the loop.",
}
_ACCEPTED_BY_CONTROLLER = "The controller judged the last image and found nothing unmet."
"""The note of an accepted trajectory without a separate verification."""
_SIGNS = {"met": "✓", "doubt": "◐", "unmet": "○", "no answer": "?", "edit": "✎"}
_EDITS = {
    "plan": "Plan changed",
    "rollback": "Returned to image",
    "by_user": "by the user",
    "requirements": "Requirements",
    "instruction": "Instruction",
    "dropped": "Dropped images",
    "branch": "Branch of",
    "from_image": "from image",
    "inherited": "of the loop before",
    "own_instruction": "instruction of the user",
}
"""What the user changed, in words."""
_SMALL = 128  # images up to this side are enlarged by whole pixels
_STEP_WIDTH, _RESULT_WIDTH = 220, 380
_LONG_PROMPT = 140


def render(trajectory: Trajectory) -> str:
    """Returns the page as HTML. Everything that comes from models, users or files is escaped."""
    steps = trajectory.steps
    items = _items(steps)
    return render_page(
        "clvr_jax.reasoning.trajectories",
        "page.html",
        style=style_sheet(),
        title=_shorten(trajectory.prompt, 70),
        outcome=trajectory.outcome,
        outcome_class="good" if trajectory.outcome == "accepted" else "open",
        outcome_note=_note(trajectory),
        prompt=trajectory.prompt,
        is_long=len(trajectory.prompt) > _LONG_PROMPT,
        facts=_facts(trajectory),
        given=[
            _embedded(image, _STEP_WIDTH, f"Given image {number}")
            for number, image in enumerate(trajectory.given_images, start=1)
        ],
        result=_result(trajectory),
        board=_board(trajectory, items),
        texts=_EDITS,
        edit_sign=_SIGNS["edit"],
        parent=trajectory.parent,
        steps=[_step(trajectory, number, items) for number in range(len(steps))],
        edits=[_edits_before(trajectory, number) for number in range(len(steps) + 1)],
        footer=", ".join(f"{name} {version}" for name, version in trajectory.versions.items()),
    )


def shared_texts() -> dict[str, JSON]:
    """Returns the texts that the page of `clvr serve` has in common with this one."""
    return {"outcomes": dict(_OUTCOME_NOTES), "signs": dict(_SIGNS), "doubt": DOUBT_NOTE, "edits": dict(_EDITS)}


def style_sheet() -> str:
    """Returns the style of the page, which `clvr serve` uses for its own page as well."""
    return read_text("clvr_jax.reasoning.trajectories", "page.css")


def _note(trajectory: Trajectory) -> str:
    """What the outcome means, and what was wrong with the last reply."""
    note = _OUTCOME_NOTES[trajectory.outcome]
    if trajectory.outcome == "accepted" and trajectory.verification is None:
        note = _ACCEPTED_BY_CONTROLLER
    return f"{note} {trajectory.error}" if trajectory.error else note


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


def _facts(trajectory: Trajectory) -> dict[str, str]:
    dropped = sum(step.rolled_back for step in trajectory.generated)
    notes = [f"{dropped} rolled back"] if dropped else []
    if trajectory.parent is not None:
        notes.append(f"{trajectory.parent.inherited} of the loop before")
    images = str(len(trajectory.generated)) + (f" ({', '.join(notes)})" if notes else "")
    return {
        "Model": trajectory.model or "not recorded",
        "Images": images,
        "Network evaluations": str(trajectory.nfe),
        "Time": _seconds(trajectory.seconds),
        "Seed": str(trajectory.seed),
    }


def _result(trajectory: Trajectory) -> dict[str, object] | None:
    """The result as an embedded image with its caption; None if there is no image."""
    if trajectory.best is None or trajectory.image is None:
        return None
    caption = f"Image {trajectory.best + 1} of {len(trajectory.generated)}"
    if (count := _unmet_count(trajectory.steps[trajectory.best])) is not None:
        caption += f", {count}"
    return {**_embedded(trajectory.image, _RESULT_WIDTH, f"The result: {caption}"), "caption": caption}


def _board(trajectory: Trajectory, items: dict[str, int]) -> dict[str, object] | None:
    """The requirements or the checklist over all images as a table: one row an item, one column an image."""
    columns = [(number, step) for number, step in enumerate(trajectory.steps) if step.image is not None]
    if not items or not columns:
        return None
    is_verified = _is_verified(trajectory.steps)
    mark = _requirement_mark if is_verified else _mark
    feet = {"unmet": _unmet_number}
    if is_verified:
        feet["met, expected"] = _expected_number
    return {
        "title": "Requirements" if is_verified else "Checklist",
        "style": "board verified" if is_verified else "board",
        "columns": [{"number": number + 1, "style": _column_style(trajectory, number)} for number, _ in columns],
        "rows": [
            {"text": item, "marks": [mark(step, item, number < first) for number, step in columns]}
            for item, first in items.items()
        ],
        "feet": [{"text": name, "cells": [value(step) for _, step in columns]} for name, value in feet.items()],
    }


def _column_style(trajectory: Trajectory, number: int) -> str:
    dropped, final = trajectory.steps[number].rolled_back, number == trajectory.best
    return " ".join(name for name, holds in (("dropped", dropped), ("final", final)) if holds)


def _unmet_number(step: Step) -> str:
    return "?" if step.unmet is None else str(len(step.unmet))


def _expected_number(step: Step) -> str:
    """The expected number of met requirements."""
    return "?" if step.verification is None or step.score is None else f"{step.score:.2f}"


def _mark(step: Step, item: str, before_known: bool) -> dict[str, object]:
    if step.unmet is None or before_known:
        return {"style": "none", "title": "not judged", "sign": "·", "probability": None}
    style, sign = ("unmet", "○") if item in step.unmet else ("met", "✓")
    return {"style": style, "title": style, "sign": sign, "probability": None}


def _requirement_mark(step: Step, item: str, _: bool) -> dict[str, object]:
    """Met or unmet, the probability as a number and a bar, and the evidence as a tooltip."""
    found = [each for each in step.verification.requirements if each.text == item] if step.verification else []
    if not found:
        return {"style": "none", "title": "not verified", "sign": "·", "probability": None}
    (state, sign), requirement = _state(found[0]), found[0]
    tip = f"{state}; {_probability(requirement)}" + (f"; {requirement.evidence}" if requirement.evidence else "")
    return {"style": _style(requirement), "title": tip, "sign": sign, "probability": _bar(requirement)}


def _state(requirement: Requirement) -> tuple[str, str]:
    """What was found out about a requirement: in words, and as a sign."""
    return requirement.state, _SIGNS[requirement.state]


def _style(requirement: Requirement) -> str:
    return "unmet" if requirement.met is None else requirement.state


def _probability(requirement: Requirement) -> str:
    value = requirement.probability
    return "no probability" if value is None else f"probability of being met {_number(value)}"


def _number(probability: float) -> str:
    """Two digits; what is not quite 0 or 1 is not shown as if it were."""
    text = f"{probability:.2f}"
    if text == "0.00" and probability > 0:
        return "<0.01"
    return ">0.99" if text == "1.00" and probability < 1 else text


def _bar(requirement: Requirement) -> dict[str, str] | None:
    """The probability as a number above a bar; None if there is none."""
    value = requirement.probability
    return None if value is None else {"number": _number(value), "percent": f"{100 * value:.0f}"}


def _edits_before(trajectory: Trajectory, number: int) -> list[dict[str, object]]:
    """The user's changes after which the step with this number was made."""
    shown: list[dict[str, object]] = []
    for edit in trajectory.edits:
        target = edit.rollback_to
        title = _EDITS["plan"] if target is None else f"{_EDITS['rollback']} {target + 1}"
        dropped = ", ".join(str(image + 1) for image in edit.dropped)
        fields: dict[str, object] = {
            "requirements": edit.requirements or (),
            "instruction": edit.instruction,
            "dropped": dropped,
        }
        if edit.step == number:
            shown.append({"title": title, **fields})
    return shown


def _step(trajectory: Trajectory, number: int, items: dict[str, int]) -> dict[str, object]:
    """One step: its number, image, badges, reasoning, what was found out about the image, and its price."""
    step = trajectory.steps[number]
    aside, reasoning = _reasoning(step.reasoning)
    shown: dict[str, object] = {"aside": aside, "reasoning": reasoning, "price": _price(step), "image": None}
    if step.image is None:
        accepted = trajectory.outcome == "accepted"
        end, sign, style = ("Accepted", "✓", "stop accepted") if accepted else ("Stopped", "■", "stop")
        return {**shown, "end": end, "sign": sign, "style": style, "badges": _attempts(step)}
    count = _unmet_count(step)
    alt = f"Image {number + 1}" + (f", {count}" if count is not None else "")
    is_verified, parent = _is_verified(trajectory.steps), trajectory.parent
    return {
        **shown,
        "image": _embedded(step.image, _STEP_WIDTH, alt),
        "sign": str(number + 1),
        "style": "rolled" if step.rolled_back else "kept",
        "badges": _badges(step, number == trajectory.best, parent is not None and number < parent.inherited),
        "verification": step.verification and _verification(trajectory.steps, number, step.verification),
        "checklist": [] if is_verified else _checklist(trajectory.steps, number, items),
    }


def _badges(step: Step, is_result: bool, is_inherited: bool) -> list[dict[str, str]]:
    badges = _attempts(step)
    count = _unmet_count(step)
    if count is not None:
        is_open = step.unmet or (step.verification is not None and not step.verification.accepted)
        badges.insert(0, {"style": "open" if is_open else "good", "text": count})
    if is_result:
        badges.append({"style": "", "text": "result"})
    if is_inherited:
        badges.append({"style": "", "text": _EDITS["inherited"]})
    if step.redraw:
        badges.append({"style": "", "text": f"generated again ({step.redraw})"})
    if step.left_out:
        badges.append({"style": "", "text": f"generated without the oldest replies ({step.left_out})"})
    if step.rolled_back:
        badges.append({"style": "", "text": "rolled back"})
    return badges


def _reasoning(text: str) -> tuple[str, str]:
    """Splits reasoning in two: up to the verdict sentence, which is set back, and the instruction."""
    span = unmet_span(text)
    return ("", text) if span is None else (text[: span[1]], text[span[1] :])


def _checklist(steps: Sequence[Step], number: int, items: dict[str, int]) -> list[dict[str, str]]:
    """Lists what this image lacks, and what it has gained over its last reference."""
    step = steps[number]
    if step.unmet is None or not items:
        return []
    source = steps[step.references[-1]].unmet if step.references else None
    entries = [{"style": "unmet", "sign": "○", "text": item} for item in dict.fromkeys(step.unmet)]
    for item, first in items.items():
        if item in step.unmet or first > number:
            continue
        style = "met just" if source is None or item in source else "met"
        entries.append({"style": style, "sign": "✓", "text": item})
    return entries


def _verification(steps: Sequence[Step], number: int, verification: Verification) -> dict[str, object]:
    """The verification of one image: requirement by requirement, on what description, and by whom."""
    references = steps[number].references
    before = steps[references[-1]].verification if references else None
    unmet_before = None if before is None else before.unmet
    rows = []
    for requirement in verification.requirements:
        state, sign = _state(requirement)
        gained = requirement.met and (unmet_before is None or requirement.text in unmet_before)
        style = _style(requirement) + (" just" if gained else "")
        found = {"text": requirement.text, "evidence": requirement.evidence, "probability": _bar(requirement)}
        rows.append({"style": style, "state": state, "sign": sign, **found})
    verifier = verification.verifier or "not recorded"
    note = DOUBT_NOTE if any(each.is_doubtful for each in verification.requirements) else ""
    return {"rows": rows, "note": note, "description": verification.description, "verifier": verifier}


def _attempts(step: Step) -> list[dict[str, str]]:
    if step.attempts == 1:
        return []
    text = f"readable at attempt {step.attempts}" if step.attempts else _EDITS["own_instruction"]
    return [{"style": "", "text": text}]


def _price(step: Step) -> list[str]:
    parts = [_seconds(step.seconds)]
    if step.image is not None:
        parts.insert(0, f"{step.nfe} NFE")
        if step.references:
            parts.append("references " + ", ".join(str(reference + 1) for reference in step.references))
        if step.seed is not None:
            parts.append(f"seed {step.seed}")
    return parts


def _embedded(image: ImageLike, width: int, alt: str) -> dict[str, object]:
    """The image as an embedded PNG: a small one enlarged by a whole factor to about `width` pixels, others as is."""
    height_px, width_px = pixels(image).shape[:2]
    small = max(height_px, width_px) <= _SMALL
    factor = max(1, round(width / width_px)) if small else 1
    png = base64.b64encode(encode_png(image)).decode()
    return {"is_small": small, "width": width_px * factor, "height": height_px * factor, "alt": alt, "png": png}


def _unmet_count(step: Step) -> str | None:
    """Returns the number of unmet items in words; None if the image was not judged."""
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
