"""Styles of training prompts: each writes an include list in one layout of text.

A style may introduce the items in any order, as long as a relation names its anchor no later than in the clause in
which it is stated; `TextBuilder.mentioned` records the order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from clvr_jax.worlds.shapes.language import training_words as words
from clvr_jax.worlds.shapes.language.training_clauses import TextBuilder
from clvr_jax.worlds.shapes.language.training_lists import (
    capital,
    ending,
    inline,
    labeled,
    listed,
    opener,
    table,
    telegram,
    where_first,
    with_where,
)

Style = Callable[[TextBuilder], str]
_FILLERS_BETWEEN = tuple(text for text in words.FILLERS if "it" not in text.split())
"""Fillers after which "it" still refers to an object."""


def _statements(t: TextBuilder, subject_first: float, covered: set[int]) -> Iterator[int]:
    """Yields the indices of the items to make statements about, in order.

    Args:
      t: writes the text.
      subject_first: probability that a new item is preceded by an item whose anchor it is.
      covered: items that need no more statement; the caller may add to it.
    """
    for index in range(len(t.include)):
        if index in covered:
            continue
        if not t.is_known(index) and t.chance(subject_first):
            child = _early_child(t, index, covered)
            if child is not None:
                covered.add(child)
                yield child
        covered.add(index)
        if not t.is_known(index) or t.has_where(index):
            yield index


def _early_child(t: TextBuilder, index: int, covered: set[int]) -> int | None:
    """Returns an item that may be stated before its new anchor; the anchor must not need a new anchor itself."""
    if t.anchor(index) >= 0 and not t.is_known(t.anchor(index)):
        return None
    children = [i for i in range(len(t.include)) if t.anchor(i) == index and i not in covered and not t.is_known(i)]
    return t.pick(children) if children else None


def _clauses(t: TextBuilder, subject_first: float = 0.15) -> list[str]:
    covered: set[int] = set()
    clauses = []
    for index in _statements(t, subject_first, covered):
        other = _alike(t, index, covered)
        if other is None or t.chance(0.4):
            clauses.append(t.clause(index))
        else:
            covered.add(other)
            clauses.append(_pair(t, index, other))
    return clauses


def _alike(t: TextBuilder, index: int, covered: set[int]) -> int | None:
    """Returns a new single object with the same relation to the same known anchor as this one, None without one."""
    item = t.include[index]
    if t.is_known(index) or item.get("position") is None or not t.is_known(t.anchor(index)):
        return None
    for other in range(len(t.include)):
        is_new = other != index and other not in covered and not t.is_known(other)
        if is_new and _relation_only(t, other) == _relation_only(t, index) is not None:
            return other
    return None


def _relation_only(t: TextBuilder, index: int) -> list[object] | None:
    """Returns the relation of a single object without a place, else None."""
    item = t.include[index]
    return None if "place" in item or item["count"] > 1 else item.get("position")


def _pair(t: TextBuilder, index: int, other: int) -> str:
    """Introduces two new items with one relation: "left of the circle are a red star and a green cross"."""
    if t.chance(0.5):
        where = t.relation(index)
        both = f"{t.a(index)} and {t.a(other)}"
        text = t.pick(("{} are {}", "{} there are {}", "{}, place both {}", "{} you see {}")).format(where, both)
    else:
        both = f"{t.a(index)} and {t.a(other)}"
        text = t.pick(("{} are both {}", "{} are {}", "put {} {}", "there are {}, both {}")).format(
            both, t.relation(index)
        )
    t.end_clause()
    return text


def _sentence_join(t: TextBuilder, sentences: Sequence[str]) -> str:
    stop = t.pick((". ", ". ", ". ", ".\n", "! ", "; "))
    if stop != "; " and t.chance(0.6):
        sentences = [capital(text) for text in sentences]
    return stop.join(sentences) + ("." if stop == "; " or "!" not in stop else "!")


# --- statements -------------------------------------------------------------------------------------------------------


def sentences(t: TextBuilder) -> str:
    """Writes one sentence for each statement, perhaps with a sentence without a request between them."""
    parts = _clauses(t)
    if t.chance(0.12):
        parts.insert(int(t.pick(range(1, len(parts) + 1))), t.filler(_FILLERS_BETWEEN))
    return _sentence_join(t, parts)


def one_sentence(t: TextBuilder) -> str:
    """Writes all statements as one sentence."""
    joint = t.pick(words.CLAUSE_JOINTS)
    return joint.join(_clauses(t)) + t.pick(("", "."))


def mixed_joints(t: TextBuilder) -> str:
    """Writes statements with different conjunctions between them."""
    first, *others = _clauses(t)
    for clause in others:
        joint = t.pick((". ", ". ", *words.CLAUSE_JOINTS))
        first += joint + (capital(clause) if joint == ". " else clause)
    return first + "."


def steps(t: TextBuilder) -> str:
    """Writes steps: "first, a red star ...; then ...; finally ..."."""
    clauses = _clauses(t)
    last = len(clauses) - 1
    kinds = [0 if i == 0 else 2 if i == last else 1 for i in range(last + 1)]
    return _sentence_join(t, [t.pick(words.STEPS[k]) + c for k, c in zip(kinds, clauses, strict=True)])


def questions(t: TextBuilder) -> str:
    """Writes polite questions, each about one or more objects."""
    form, verb = t.pick(words.QUESTIONS), t.pick(words.QUESTION_VERBS)
    parts = [f"{verb} {with_where(t, index)}" for index in range(len(t.include))]
    size = t.pick((1, 2, len(parts)))
    groups = [parts[begin : begin + size] for begin in range(0, len(parts), size)]
    written = [form.format(", ".join(group[:-1]) + (", and " if group[:-1] else "") + group[-1]) for group in groups]
    return " ".join(map(capital, written) if t.chance(0.5) else written)


def demands(t: TextBuilder) -> str:
    """Writes statements of the positions that objects should have."""
    head = t.pick(("i want ", "we need ", "draw ", "there should be ", "the image must show ", ""))
    parts = []
    for index in _statements(t, 0.25, set()):
        if not t.has_where(index):
            parts.append(f"{head}{t.a(index)}")
        elif t.is_known(index) or t.chance(0.7):
            subject = t.named(index)
            parts.append(f"{subject} {t.modal(index)} {t.where(index)}")
        else:
            parts.append(f"{head}{t.a(index)} {t.where(index)}")
        t.end_clause()
    return _sentence_join(t, parts)


def relative(t: TextBuilder) -> str:
    """Writes noun phrases with relative clauses: "a red star that is above a blue circle"."""
    head, parts = opener(t), []
    for index in _statements(t, 0.6, set()):
        if t.is_known(index):
            parts.append(f"{t.the(index)} {'is' if t.is_one(index) else 'are'} {t.where(index)}")
        elif t.has_where(index):
            subject, link = t.a(index), _link(t, index)
            parts.append(f"{subject} {link} {t.where(index)}")
        else:
            parts.append(t.a(index))
        t.end_clause()
    # Clauses about a known anchor are separate sentences; semicolons separate them from noun phrases.
    return head + t.pick(("; ", "; ", ". ", ", and ")).join(parts) + ending(t)


def _link(t: TextBuilder, index: int) -> str:
    link = t.pick(words.RELATIVES)
    if "{verb_ing}" in link:
        return t.pick(("sitting", "lying", "standing", "placed", "located", "positioned", "resting", "appearing"))
    return t.fill(link, index)


# --- objects first ----------------------------------------------------------------------------------------------------


def _object_list(t: TextBuilder) -> str:
    """Lists the items without places; two consecutive items of one color or shape may share the word for it."""
    parts, rest = [], list(range(len(t.include)))
    while rest:
        index = rest.pop(0)
        shared = _shared(t, index, rest[0]) if rest and t.chance(0.6) else ""
        if shared:
            rest.pop(0)
        parts.append(shared or t.a(index))
    t.end_clause()
    return listed(t, parts)


def _shared(t: TextBuilder, index: int, other: int) -> str:
    """Returns one phrase for two single items, "" if they share neither color nor shape."""
    one, two = t.include[index], t.include[other]
    if one["count"] > 1 or two["count"] > 1 or "color" not in one or "color" not in two:
        return ""
    an = "an" if one["color"][0] in "aeiou" else "a"
    an_other = "an" if two["color"][0] in "aeiou" else "a"
    first, second = one["color"], two["color"]
    if one["class"] == two["class"]:
        shape, shapes = one["class"], words.PLURALS[one["class"]]
        forms: tuple[str, ...]
        forms = (f"{an} {first} and {an_other} {second} {shape}", f"two {shapes} (one {first} and one {second})",
                 f"{an} {first} {shape} and {an_other} {second} one", f"one {first} and one {second} {shape}",
                 f"one {shape} in {first} and another in {second}")  # fmt: skip
    elif first == second:
        forms = (f"a {one['class']} and a {two['class']} (both {first})",
                 f"a {one['class']} and a {two['class']} that are both {first}",
                 f"one {one['class']} and one {two['class']} (each of them {first})")  # fmt: skip
    else:
        return ""
    t.mention(index)
    t.mention(other)
    return t.pick(forms)


def objects_first(t: TextBuilder) -> str:
    """Writes the objects first, then their places and relations, in any order."""
    head = opener(t) + _object_list(t) + t.pick((ending(t), "", ""))
    placed = [index for index in range(len(t.include)) if t.has_where(index)]
    if t.chance(0.5):
        placed = t.shuffled(placed)
    joint, rules = t.pick((". ", ". ", "; ", ", ", " and ", "\n")), t.pick(words.RULE_HEADS)
    clauses = joint.join(t.clause(index, plain=rules.endswith("that ")) for index in placed)
    stop = (
        ": " if not rules and t.chance(0.15) else ", " if rules.endswith("that ") else t.pick((". ", ". ", "; ", ".\n"))
    )
    return head + stop + rules + clauses + t.pick((".", ""))


def objects_then_bullets(t: TextBuilder) -> str:
    """Writes a list of objects, then short rules on lines: "- red star: left of the blue circle"."""
    head = t.pick(words.LIST_HEADS) + _object_list(t)
    placed = t.shuffled([index for index in range(len(t.include)) if t.has_where(index)])
    mark, bullet = t.pick((": ", " ", " = ", " -> ", " is ")), t.pick(("- ", "* ", "", "> "))
    lines = []
    for index in placed:
        subject = t.anchor(index) if t.is_inverse(index) else index
        name = t.the(subject) if t.chance(0.6) else t.bare_the(subject)
        agreed = " are " if mark == " is " and not t.is_one(subject) else mark
        lines.append(f"{bullet}{name}{agreed}{t.where(index) if subject == index else t.inverse(index)}")
        t.end_clause()
    return f"{head}{t.pick(('.', '', ':', ' where'))}\n" + "\n".join(lines)


# --- around an anchor -------------------------------------------------------------------------------------------------


def _around(t: TextBuilder, index: int, covered: set[int]) -> list[int]:
    return [
        i for i in range(len(t.include)) if t.anchor(i) == index and i not in covered and "place" not in t.include[i]
    ]


def nested(t: TextBuilder) -> str:
    """Writes each anchor together with the items around it: "a red star with a blue circle to its left"."""
    head, covered, groups = opener(t), set[int](), []
    for index in range(len(t.include)):
        if index in covered:
            continue
        text = with_where(t, index, is_clause=False)
        # After "left of the circle" a pronoun could refer to the circle.
        around = _around(t, index, covered) if t.anchor(index) < 0 else []
        covered.update((index, *around))
        if around:
            sides = _sides(t, index, around)
            text += f" {_with(t, index)} {listed(t, sides)}"
        t.end_clause()
        groups.append(text)
    return head + t.pick(("; ", "; ", ". also ", ". then ", ".\n")).join(groups) + ending(t)


def _sides(t: TextBuilder, index: int, around: Sequence[int]) -> list[str]:
    """Returns phrases for the items around an anchor: "a blue circle to its left", or "to its left a blue circle"."""
    names = [t.include[other]["position"][0] for other in around]
    if t.chance(0.35):
        return [f"{t.its(index, name)} {t.a(other)}" for other, name in zip(around, names, strict=True)]
    sides = [f"{t.a(around[0])} {t.its(index, names[0])}"]
    # After another object a pronoun could refer to that object.
    sides += [
        f"{t.a(other)} {t.brief(words.RELATIONS[name])} {t.the(index)}"
        for other, name in zip(around[1:], names[1:], strict=True)
    ]
    return sides


def _with(t: TextBuilder, index: int) -> str:
    link = t.pick(words.WITH)
    return "that have" if link == "that has" and not t.is_one(index) else link


def chain(t: TextBuilder) -> str:
    """Writes items relative to the previous one: "a red star, to its left a circle, below that a square"."""
    joint, parts = t.pick((", ", "; ", ", ", " - ", ". ", ", and ")), []
    head = opener(t)
    for index in _depth_first(t):
        target = t.anchor(index)
        if target < 0 or target != (t.mentioned or [-1])[-1] or "place" in t.include[index]:
            parts.append(with_where(t, index, "{} {}"))
            continue
        name = t.include[index]["position"][0]
        if t.is_pronoun_clear(target) and t.chance(0.6):
            where = t.its(target, name)
        else:
            where = f"{t.brief(words.RELATIONS[name])} {_that(t, target)}"
        t.mention(target)
        parts.append(f"{where} {t.a(index)}" if joint != ", and " else f"{where} there is {t.a(index)}"
                     if t.is_one(index) else f"{where} there are {t.a(index)}")  # fmt: skip
        t.end_clause()
    return head + joint.join(parts) + ending(t)


def _that(t: TextBuilder, index: int) -> str:
    """Refers to the item that was introduced last."""
    item = t.include[index]
    last = ("the last one", "the previous one", "the one just named") if t.is_one(index) else ("the last ones",)
    if t.chance(0.3):
        return t.pick(last)
    shape = item["class"] if t.is_one(index) else words.PLURALS[item["class"]]
    color = f"{item['color']} " if "color" in item and t.chance(0.4) else ""
    if not color and sum(other["class"] == item["class"] for other in t.include) > 1:
        return t.the(index)
    return f"{'that' if t.is_one(index) else 'those'} {color}{shape}"


def _depth_first(t: TextBuilder) -> list[int]:
    """Returns the items in depth-first order, so that each directly follows its anchor if possible."""
    order: list[int] = []

    def add(index: int) -> None:
        order.append(index)
        for child in range(len(t.include)):
            if t.anchor(child) == index:
                add(child)

    for index in range(len(t.include)):
        if t.anchor(index) < 0:
            add(index)
    return order


STYLES: tuple[Style, ...] = (
    inline, relative, where_first, telegram, labeled, table, sentences, one_sentence, mixed_joints, steps, questions,
    demands, objects_first, objects_then_bullets, nested, chain, sentences, objects_first,
    objects_first,
)  # fmt: skip
"""Functions that write an include list as a prompt; styles that people use often are here twice."""
