"""Layouts of noun phrases with their places: sentences, tables, lists of keywords, bullets."""

from __future__ import annotations

from collections.abc import Sequence

from clvr_jax.worlds.shapes.language import training_words as words
from clvr_jax.worlds.shapes.language.training_clauses import TextBuilder


def capital(text: str) -> str:
    """Returns the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def listed(t: TextBuilder, parts: Sequence[str]) -> str:
    """Joins parts by commas, the last one by a conjunction."""
    return t.pick(words.LAST_JOINTS).join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]


def opener(t: TextBuilder) -> str:
    """Samples words before a list of objects, often none."""
    if t.chance(0.4):
        return ""
    if t.chance(0.1):
        return t.pick(words.NUMBERED_HEADS).format(n=_number(t))
    return t.filler(words.OPENERS)


def ending(t: TextBuilder) -> str:
    """Samples words after the last object, mostly none."""
    return t.filler(words.ENDINGS) if t.chance(0.3) else ""


def _number(t: TextBuilder) -> str:
    total = sum(item["count"] for item in t.include)
    return words.NUMBERS[total - 1] if t.chance(0.7) else str(total)


def with_where(t: TextBuilder, index: int, form: str = "{} {}", is_clause: bool = True) -> str:
    """Introduces an item with its place or relation: "a red star at the top".

    Args:
      t: writes the text.
      index: the item.
      form: template of the item and its place.
      is_clause: end the clause after the item.
    """
    subject = t.a(index)
    where = t.where(index) if t.has_where(index) else t.brief(words.ANYWHERE)
    if is_clause:
        t.end_clause()
    return form.format(subject, where) if where else subject


def inline(t: TextBuilder) -> str:
    """Writes one sentence of noun phrases, each followed by its place."""
    head, joint = opener(t), t.pick(words.JOINTS)
    form = t.pick(("{} {}", "{} {}", "{} {}", "{} ({})", "{}, {}" if joint in ("; ", " / ") else "{} {}"))
    parts = [with_where(t, index, form) for index in range(len(t.include))]
    text = joint.join(parts) if t.chance(0.6) else ", ".join(parts[:-1]) + ", and " + parts[-1]
    return head + text + ending(t)


def where_first(t: TextBuilder) -> str:
    """Writes each place before its item: "top left: a red star; below it: a blue circle"."""
    mark, joint = t.pick((": ", ": ", " - ", ", ", " = ", " -> ")), t.pick(("; ", ". ", "\n", " | "))
    parts = []
    for index in range(len(t.include)):
        if t.has_where(index):
            where = t.where(index) if t.anchor(index) >= 0 or t.chance(0.5) else t.pick(_labels(t, index))
            parts.append(f"{where}{mark}{t.a(index)}")
        else:
            anywhere = t.pick(("anywhere", "somewhere", "free spot", "wherever", "any spot"))
            parts.append(f"{anywhere}{mark}{t.a(index)}" if t.chance(0.5) else t.a(index))
        t.end_clause()
    return t.pick(words.LIST_HEADS) + joint.join(parts)


def _labels(t: TextBuilder, index: int) -> tuple[str, ...]:
    return words.LABELS[t.include[index]["place"]]


def telegram(t: TextBuilder) -> str:
    """Writes keywords only: "red star top left, blue circle left of red star"."""
    joint = t.pick((", ", ", ", "; ", " / ", ". ", " + ", "\n", " | "))
    parts = []
    for index in range(len(t.include)):
        subject, where = t.bare(index), ""
        if "place" in t.include[index]:
            where = t.pick(_labels(t, index))
        if "position" in t.include[index]:
            name, target = t.include[index]["position"]
            side = t.pick((name, t.brief(words.RELATIONS[name])))
            where = f"{where} {side} {t.bare_the(target) if t.chance(0.8) else t.the(target)}".strip()
        parts.append(f"{subject} {where}".rstrip())
    return t.pick(("", "", *words.LIST_HEADS)) + joint.join(parts)


def labeled(t: TextBuilder) -> str:
    """Writes a label for each item, on lines or after bullets: "- red star: top left"."""
    dash = t.pick((": ", " - ", ": ", " -> ", " = ", " ... ", " at: ", " @ "))
    bullet, joint = t.pick((("- ", "\n"), ("* ", "\n"), ("# ", "\n"), ("", "; "), ("", "\n"), ("1. ", "\n"),
                            ("1) ", " "), ("(1) ", ", "), ("a) ", "; "), ("• ", "\n"), ("1: ", "; ")))  # fmt: skip
    by_number = t.pick(("item ", "number ", "#", "no. ", "object ")) if "1" in bullet and t.chance(0.3) else ""
    parts = []
    for number, index in enumerate(range(len(t.include))):
        subject = t.a(index) if t.chance(0.5) else t.bare(index)
        where = t.where(index) if t.has_where(index) else t.brief(words.ANYWHERE)
        if by_number and "place" not in t.include[index] and t.anchor(index) >= 0:
            where = f"{t.brief(words.RELATIONS[t.include[index]['position'][0]])} {by_number}{t.anchor(index) + 1}"
        t.end_clause()
        mark = bullet.replace("1", str(number + 1)).replace("a)", f"{'abcdefghi'[number]})")
        parts.append(mark + (f"{subject}{dash}{where}" if where else subject))
    head = t.pick(words.LIST_HEADS).rstrip()
    return head + ("\n" if joint == "\n" and head else " " if head else "") + joint.join(parts)


def table(t: TextBuilder) -> str:
    """Writes rows of an object and its position."""
    what, place = t.pick(words.TABLE_KEYS)
    row = t.pick((f"{what}: {{}}, {place}: {{}}", f"{what}: {{}} {place}: {{}}", "{} | {}", "| {} | {} |",
                  f"{what} = {{}}; {place} = {{}}", "{}, {}", f"[{what}: {{}}; {place}: {{}}]"))  # fmt: skip
    free, head = t.pick(words.TABLE_ANYWHERE), ""
    if row == "{} | {}":
        head = f"{what} | {place}\n"
    elif row == "| {} | {} |":
        head = f"| {what} | {place} |\n"
    rows = []
    for index in range(len(t.include)):
        subject = t.bare(index) if t.chance(0.7) else t.a(index)
        place_only = "place" in t.include[index] and t.anchor(index) < 0 and t.chance(0.6)
        where = t.pick(_labels(t, index)) if place_only else t.where(index)
        t.end_clause()
        rows.append(row.format(subject, where or free))
    return head + t.pick(("\n", "\n", "; ") if "|" not in row and ";" not in row else ("\n",)).join(rows)
