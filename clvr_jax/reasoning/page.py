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

_OUTCOME_NOTES = {
    "accepted": "The controller looked at the last picture and found nothing unmet.",
    "gave up": "The controller stopped although not everything is met.",
    "step limit": "The budget of steps is spent; this is the best picture so far.",
    "nfe limit": "The budget of network evaluations is spent; this is the best picture so far.",
    "time limit": "The time is up; this is the best picture so far.",
    "unparseable": "The controller's reply could not be read, which never counts as an accept.",
}
_SMALL = 128  # pictures up to this side are enlarged by whole pixels
_STEP_WIDTH, _RESULT_WIDTH = 220, 380
_LONG_PROMPT = 140


def render(trajectory: Trajectory) -> str:
    """The page as HTML text. Everything that comes from models or users is escaped."""
    template = Template(resources.files("clvr_jax.reasoning").joinpath("page.html").read_text(encoding="utf-8"))
    steps = trajectory.steps
    items = _items(steps)
    note = _OUTCOME_NOTES[trajectory.outcome]
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
    """Every checklist item -> the first step at which it is known: 0 for the plan, else where it was first unmet."""
    items = dict.fromkeys(plan_items(steps[0].reasoning), 0) if steps else {}
    for number, step in enumerate(steps):
        for item in step.verdict.unmet if step.verdict else ():
            items.setdefault(item, number)
    return items


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
    if trajectory.verdict is not None:
        caption += f", {_unmet_count(trajectory.verdict.score)}"
    return (
        f'<div class="mat">{_img(trajectory.image, _RESULT_WIDTH, f"The result: {caption}")}</div>'
        f"<figcaption>{escape(caption)}</figcaption>"
    )


def _board(trajectory: Trajectory, items: dict[str, int]) -> str:
    """The checklist over all pictures as a table: one row an item, one column a picture."""
    columns = [(number, step) for number, step in enumerate(trajectory.steps) if step.image is not None]
    if not items or not columns:
        return ""
    styles = {
        number: " ".join(
            name for name, holds in (("dropped", step.rolled_back), ("final", number == trajectory.best)) if holds
        )
        for number, step in columns
    }
    head = "".join(f'<th scope="col" class="{styles[number]}">{number + 1}</th>' for number, _ in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(item)}</th>'
        + "".join(f'<td class="{styles[number]}">{_mark(step, item, number < first)}</td>' for number, step in columns)
        + "</tr>"
        for item, first in items.items()
    )
    foot = "".join(
        f'<td class="{styles[number]}">{"?" if step.verdict is None else step.verdict.score}</td>'
        for number, step in columns
    )
    return (
        '<h2>Checklist</h2><div class="board"><table>'
        f'<thead><tr><th scope="col">Picture</th>{head}</tr></thead><tbody>{body}</tbody>'
        f'<tfoot><tr><th scope="row">unmet</th>{foot}</tr></tfoot></table></div>'
    )


def _mark(step: Step, item: str, before_known: bool) -> str:
    if step.verdict is None or before_known:
        return '<span class="none" title="not judged">·</span>'
    if item in step.verdict.unmet:
        return '<span class="unmet" title="unmet">○</span>'
    return '<span class="met" title="met">✓</span>'


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
    if step.verdict is not None:
        style = "open" if step.verdict.unmet else "good"
        badges = f'<span class="badge {style}">{_unmet_count(step.verdict.score)}</span>{badges}'
    if step.redraw:
        badges += f'<span class="badge">drawn again ({step.redraw})</span>'
    if step.rolled_back:
        badges += '<span class="badge">rolled back</span>'
    alt = f"Picture {number + 1}" + (f", {_unmet_count(step.verdict.score)}" if step.verdict else "")
    return (
        f'<li class="{"rolled" if step.rolled_back else "kept"}"><span class="number">{number + 1}</span>'
        f'<div class="step"><div class="mat">{_img(step.image, _STEP_WIDTH, alt)}</div><div>'
        f'<div class="head">{badges}</div>{says}{_checklist(trajectory.steps, number, items)}{_price(step)}'
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
    if step.verdict is None or not items:
        return ""
    source = steps[step.references[-1]].verdict if step.references else None
    entries = [f'<li class="unmet">○ {escape(item)}</li>' for item in dict.fromkeys(step.verdict.unmet)]
    for item, first in items.items():
        if item in step.verdict.unmet or first > number:
            continue
        gained = " just" if source is None or item in source.unmet else ""
        entries.append(f'<li class="met{gained}">✓ {escape(item)}</li>')
    return f'<ul class="list" aria-label="Checklist">{"".join(entries)}</ul>'


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


def _unmet_count(count: int) -> str:
    return f"{count} unmet" if count else "nothing unmet"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _shorten(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
