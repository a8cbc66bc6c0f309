"""Reading what a verifier answers: how probable its yes is, and whether its evidence supports it.

Evidence quotes clauses of a description, as in "red star top left; blue cross top", or counts all of them one by one,
as in "one: red star top left; two: blue cross top". A model that was trained to quote is held to it: a yes that rests
on a clause the description does not have, or that does not name what is required, is no yes, and an answer that
contradicts the description is asked for again.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

from clvr_jax.interfaces import ChatResponse
from clvr_jax.reasoning.verification.places import PLACE_WORDS, place_of

ANSWER = re.compile(r"\b(yes|no)\b\W*$", re.IGNORECASE)
"""The last word of an answer."""
_DENIAL = re.compile(r"(?:no|nothing) ")
_COUNTED = re.compile(r"\w+ objects?")
_WORD = re.compile(r"[^\W_]+")
_RELATION = re.compile(
    r"\b(?:left of|right of|in front of|next to|above|below|under|over|behind|beside|between|near)\b"
)
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ENUMERATED = re.compile(rf"^(?:{'|'.join(_NUMBERS)}): ")
_FUNCTION_WORDS = frozenset(
    ("a", "an", "the", "of", "to", "in", "on", "at", "and", "with", "object", "objects", *_NUMBERS)
)


def answer_probability(answer: ChatResponse) -> float | None:
    """Returns the probability of yes against no where the answer says one of them; None without token probabilities.

    A word may be written with several tokens, and the space before it may be a token of its own. Such a space does not
    lead to a word whose token holds the space: each word has one spelling.
    """
    match = ANSWER.search(answer.text)
    if match is None or not answer.tokens:
        return None
    word = match[1].lower()
    other = "no" if word == "yes" else "yes"
    first = len(answer.text[: match.start()].rstrip())
    reached, of_word, of_other, begin = 1.0, 0.0, 0.0, 0
    for token in answer.tokens:
        end = begin + len(token.text)
        if begin >= first or end > match.start():
            for text, logprob in token.top.items():
                mass = reached * math.exp(logprob)
                if text == token.text:
                    continue
                if _begins(word, text):
                    of_word += mass
                elif _begins(other, text) or (text and not text.strip()):
                    of_other += mass
            reached *= math.exp(token.logprob)
        if end > match.start():
            of_word += reached
            yes, no = (of_word, of_other) if word == "yes" else (of_other, of_word)
            return yes / (yes + no) if yes + no > 0 else None
        begin = end
    return None


def evidence_probability(description: ChatResponse, evidence: str) -> float:
    """Returns the probability of the clauses that evidence quotes; of all clauses if it quotes none, or others too.

    Returns: the product of the probabilities of their tokens; 1 if the description has no token probabilities.
    """
    return math.exp(sum(_quoted_logprobs(description, evidence).values()))


def least_clause_probability(description: ChatResponse, evidence: str) -> float:
    """Returns the probability of the least probable of these clauses; 1 without token probabilities."""
    return math.exp(min(_quoted_logprobs(description, evidence).values(), default=0.0))


def least_probable_clause(description: ChatResponse, evidence: str) -> str:
    """Returns the least probable of these clauses; "" without clauses or without token probabilities."""
    quoted = _quoted_logprobs(description, evidence) if description.tokens else {}
    return min(quoted, key=quoted.__getitem__, default="")


def _quoted_logprobs(description: ChatResponse, evidence: str) -> dict[str, float]:
    """Returns the log probability of each clause that evidence quotes; of all if it quotes none, or others too.

    A clause that the description repeats counts with all its tokens.
    """
    quoted = {_ENUMERATED.sub("", clause) for clause, _, _ in _clause_spans(evidence)}
    spans = _clause_spans(description.text)
    known = {clause for clause, _, _ in spans}
    relevant = [span for span in spans if span[0] in quoted] if quoted and quoted <= known else spans
    logprobs, begin = dict.fromkeys((clause for clause, _, _ in relevant), 0.0), 0
    for token in description.tokens or ():
        end = begin + len(token.text)
        for clause, first, last in relevant:
            if begin < last and end > first:
                logprobs[clause] += token.logprob
                break  # a token that reaches into the next clause is counted once
        begin = end
    return logprobs


def is_consistent(description: str, requirement: str, answer: str) -> bool:
    """Whether an answer agrees with the description that it quotes; True if it says neither yes nor no.

    A yes must be supported, see `supports`. A no must not deny what the description says ("no red star" although it
    has "red star top"), nor quote or count what it does not say. Both must quote all objects that the requirement
    names, or, if it names a place, what the description has there.
    """
    match = ANSWER.search(answer)
    if match is None:
        return True
    evidence = answer[: match.start()].strip().rstrip(".")
    if match[1].lower() == "yes":
        return supports(description, requirement, evidence) and not omits(description, requirement, evidence)
    clauses = clauses_of(evidence)
    if any(_ENUMERATED.match(clause) for clause in clauses):
        is_required_number = _counts_to(requirement, clauses)
        has_uncounted = not all(_ENUMERATED.match(clause) for clause in clauses)
        return _counts_all(description, clauses) and not (is_required_number and not has_uncounted)
    denied = [clause for clause in clauses if _DENIAL.match(clause)]
    quoted = [clause for clause in clauses if clause not in denied]
    return not (
        _quotes_unknown(description, requirement, quoted)
        or any(_is_shown(description, clause) for clause in denied)
        or omits(description, requirement, evidence)
        or _looks_elsewhere(description, requirement, quoted)
    )


def supports(description: str, requirement: str, evidence: str) -> bool:
    """Whether evidence for a yes is in the description and names what is required."""
    clauses = clauses_of(evidence)
    if any(_ENUMERATED.match(clause) for clause in clauses) and not _counts_to(requirement, clauses):
        return False
    return not invents(description, requirement, evidence) and names_required(requirement, evidence)


def invents(description: str, requirement: str, evidence: str) -> bool:
    """Whether evidence holds a clause that the description does not, or counts its clauses wrongly one by one."""
    quoted = [clause for clause in clauses_of(evidence) if not _COUNTED.fullmatch(clause)]
    if any(_ENUMERATED.match(clause) for clause in quoted):
        return not (_counts_all(description, quoted) and all(_ENUMERATED.match(clause) for clause in quoted))
    return _quotes_unknown(description, requirement, quoted)


def omits(description: str, requirement: str, evidence: str) -> bool:
    """Whether evidence leaves out an object of the description that a requirement without a place names."""
    sides = [_WORD.findall(side) for side in _RELATION.split(requirement.lower())]
    if any(PLACE_WORDS & set(words) for words in sides):
        return False
    pairs = [pair for words in sides for pair in itertools.pairwise(words)]
    named = {f"{first} {form}" for first, second in pairs for form in _singular_forms(second)}
    quoted = {_ENUMERATED.sub("", clause) for clause in clauses_of(evidence)}
    return any(" ".join(clause.lower().split()[:2]) in named and clause not in quoted for clause in _known(description))


def _looks_elsewhere(description: str, requirement: str, quoted: Sequence[str]) -> bool:
    """Whether evidence quotes other places than the one that a requirement without a relation names."""
    place = "" if _RELATION.search(requirement) else place_of(requirement)
    there = [clause for clause in _known(description) if place and place_of(clause) == place]
    return bool(there and quoted) and not set(there) & set(quoted)


def names_required(requirement: str, evidence: str) -> bool:
    """Whether evidence holds every word of a requirement, apart from numbers, relations and other function words."""
    quoted = {form for word in _WORD.findall(evidence.lower()) for form in _singular_forms(word)}
    required = set(_WORD.findall(_RELATION.sub(" ", requirement.lower()))) - _FUNCTION_WORDS
    return all(quoted & _singular_forms(word) for word in required)


def _quotes_unknown(description: str, requirement: str, clauses: Sequence[str]) -> bool:
    """Whether a clause is not in the description, or more often than there; on each side of a relation once."""
    sides = 2 if _RELATION.search(requirement) else 1
    return bool(Counter(clauses) - Counter(sides * _known(description)))


def _counts_all(description: str, clauses: Sequence[str]) -> bool:
    """Whether enumerated evidence lists the whole description in order; clauses that do not count have no number."""
    numbered = [clause.partition(":")[0] for clause in clauses if _ENUMERATED.match(clause)]
    listed = [_ENUMERATED.sub("", clause) for clause in clauses]
    return listed == _known(description) and numbered == list(_NUMBERS[: len(numbered)])


def _counts_to(requirement: str, clauses: Sequence[str]) -> bool:
    """Whether enumerated evidence ends at the number that is required."""
    numbers = [word for word in _WORD.findall(requirement.lower()) if word in _NUMBERS]
    return bool(numbers) and numbers[0] == [each.partition(":")[0] for each in clauses if _ENUMERATED.match(each)][-1]


def _is_shown(description: str, denial: str) -> bool:
    """Whether the description has what evidence denies: "no red star", or "nothing top left", a place."""
    negation, *words = denial.split()
    if negation == "no":
        return any(set(words) <= set(clause.split()) for clause in _known(description))
    return any(clause.split()[2:] == words for clause in _known(description))


def _known(description: str) -> list[str]:
    return [clause.removeprefix("Plan:").strip() for clause in clauses_of(description)]


def clauses_of(text: str) -> list[str]:
    """Returns the clauses of a description or of evidence, without "I see"."""
    return [clause for clause, _, _ in _clause_spans(text)]


def _singular_forms(word: str) -> set[str]:
    return {word, word.removesuffix("s"), word.removesuffix("es")}


def _begins(word: str, token: str) -> bool:
    text = token.strip().lower()
    return bool(text) and word.startswith(text)


def _clause_spans(text: str) -> list[tuple[str, int, int]]:
    """Clauses between semicolons, periods and line ends, without "I see": (clause, start, end)."""
    spans = []
    for match in re.finditer(r"[^;.\n]+", text):
        clause = match[0].strip()
        clause = clause.removeprefix("I see ").strip()
        if clause:
            spans.append((clause, match.start(), match.end()))
    return spans
