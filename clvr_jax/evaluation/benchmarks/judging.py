"""Asks a judge about pictures: many questions in flight, every answer on disk as it comes, none asked twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.benchmark import JudgeQuestion
from clvr_jax.image_io import EncodedPicture
from clvr_jax.interfaces import ChatModel, ChatRequest, ProviderError, Usage
from clvr_jax.json_input import JsonObject, parse_object, shown
from clvr_jax.outputs import name_for
from clvr_jax.reasoning.answers import AnswerError


@dataclass(frozen=True)
class JudgeModel:
    """Who looks.

    model: asked at temperature 0. revision: of its weights, as far as anybody knows. in_flight: questions at once.
    max_tokens: of a reply, for models that think before they answer; the benchmark's own number if None.
    """

    model: ChatModel
    revision: str | None = None
    in_flight: int = 64
    max_tokens: int | None = None


@dataclass(frozen=True)
class JudgeTask:
    """A picture to be looked at: its name in the file of answers, how it is read, and what is asked about it."""

    name: str
    load: Callable[[], EncodedPicture]
    questions: Sequence[JudgeQuestion]


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply.

    text: None if it gave none; then `error` says why, and `fault` whether it refused or what came is no reply.
    adapted: what was different in the requests from what is asked of other servers, in words.
    """

    text: str | None
    error: str | None
    usage: Usage
    fault: Literal["refused", "malformed"] | None = None
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """What a judge said about one picture.

    Attributes:
      found: name of the question -> what was read; None if nothing could be.
      usage: of all replies that were used, those of earlier runs included.
      is_refused: whether the judge's policy refused a question to the end.
      adapted: see `JudgeReply`, of all replies.
    """

    found: Mapping[str, Any]
    usage: Usage
    is_refused: bool
    adapted: frozenset[str]


class AnswerFile:
    """All replies of one judge about one folder of pictures, one JSON object a line, appended as they come.

    A reply is found again by the picture's bytes and the question's text, so a picture that was drawn anew is looked at
    anew. A line that was cut short by the end of a process is left out, and so is one of an earlier version that holds
    no reply and does not say whether the judge refused: the question is asked again.

    Args:
      folder: of the file.
      judge: whose they are.
    """

    def __init__(self, folder: Path, judge: JudgeModel):
        self._path = folder / f"{name_for(judge.model.name, judge.revision)}.jsonl"
        self._said = dict(_read_lines(self._path)) if self._path.exists() else {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
            if self._file.tell() and not self._path.read_bytes().endswith(b"\n"):
                self._file.write(b"\n")
        except OSError as error:
            raise ClvrError(f"{self._path}: cannot be written ({error.strerror or error})") from error

    def get(self, key: str) -> JudgeReply | None:
        """A reply that was given before."""
        return self._said.get(key)

    def add(self, key: str, subject: str, question: str, said: JudgeReply) -> None:
        """Writes a reply down. Raises: ClvrError if that fails."""
        usage = {name: value for name, value in dataclasses.asdict(said.usage).items() if value}
        entry: dict[str, Any] = {
            "key": key,
            "picture": subject,
            "question": question,
            "reply": said.text,
            "error": said.error,
        }
        if said.fault is not None:
            entry["fault"] = said.fault
        if said.adapted:
            entry["adapted"] = list(said.adapted)
        # Lone surrogates become escapes of JSON.
        line = json.dumps({**entry, "usage": usage}, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise ClvrError(f"{self._path}: cannot be written ({error.strerror or error})") from error
            self._said[key] = said

    def put_aside(self) -> Path:
        """Renames the file, so that every question is asked again; returns its new place.

        Raises: ClvrError if it cannot be renamed.
        """
        aside = self._path.with_suffix(".unreadable")
        try:
            self._file.close()
            self._path.replace(aside)
        except OSError as error:
            raise ClvrError(f"{self._path}: cannot be renamed ({error.strerror or error}); remove it") from error
        return aside

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def chat_all(
    judge: JudgeModel,
    subjects: Sequence[JudgeTask],
    answers: AnswerFile,
    attempts: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Judged]:
    """Asks every question about every picture.

    A reply that cannot be read is asked for again, with what was wrong with it, up to `attempts` times in all. The
    questions about one picture come one after the other, those about others at the same time.

    Args:
      judge: who is asked.
      subjects: the pictures.
      answers: replies known before, and where new ones go.
      attempts: at least 1.
      on_progress: called with (pictures done, pictures in all).
    Returns: what was said about each picture.
    Raises: ClvrError if the judge cannot be asked, or an image cannot be read; replies that came before are kept. Also
      if no reply about several images can be parsed: this is a fault of the server, not of the images, so
      nothing is scored, and the next run asks again.
    """
    done, lock, said_first = 0, threading.Lock(), ""

    def look(subject: JudgeTask) -> Judged:
        nonlocal done, said_first
        picture = subject.load()
        found, replies, is_refused = {}, [], False
        for asked in subject.questions:
            found[asked.name], given = _answer(judge, subject.name, picture, asked, answers, attempts)
            is_refused |= found[asked.name] is None and given[-1].fault == "refused"
            replies += given
        with lock:
            done += 1
            said_first = said_first or replies[-1].text or ""
            if on_progress:
                on_progress(done, len(subjects))
        usage = sum((said.usage for said in replies), Usage())
        return Judged(found, usage, is_refused, frozenset(note for said in replies for note in said.adapted))

    if on_progress:
        on_progress(0, len(subjects))
    with ThreadPoolExecutor(judge.in_flight, thread_name_prefix="judge") as pool:
        futures = [pool.submit(look, subject) for subject in subjects]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = next((error for future in finished if (error := future.exception()) is not None), None)
        if failed is not None:
            pool.shutdown(cancel_futures=True)
            if not isinstance(failed, ClvrError):
                raise failed
            kept = f"; {done} of {len(subjects)} pictures are judged and kept, run again to go on"
            raise ClvrError(f"{failed}{kept}") from failed
    judged = [future.result() for future in futures]
    if len(judged) > 1 and not any(about.is_refused or any(map(_is_read, about.found.values())) for about in judged):
        first, aside = " ".join(said_first.split())[:120], answers.put_aside()
        raise ClvrError(
            f"{judge.model.name}: none of its replies about {len(judged)} images can be parsed (the first: "
            f"{first!r}), so nothing is scored; they are kept in {aside}; look after the server, or choose another "
            "judge, and run again"
        )
    return judged


def _is_read(value: Any) -> bool:
    return value is not None


def _answer(
    judge: JudgeModel, subject: str, picture: EncodedPicture, asked: JudgeQuestion, answers: AnswerFile, attempts: int
) -> tuple[Any, list[JudgeReply]]:
    """What one question found out, None if nothing could be read; and the replies, one at least."""
    complaint, replies = "", []
    for attempt in range(attempts):
        text = asked.text + complaint
        key = _key(picture, text, attempt)
        said = answers.get(key)
        if said is None:
            said = _said(judge, picture, text, asked)
            answers.add(key, subject, asked.name, said)
        replies.append(said)
        if said.text is None:
            continue
        try:
            return asked.read(said.text), replies
        except AnswerError as error:
            complaint = f"\nYour last answer could not be used: {error}\n"
    return None, replies


def _said(judge: JudgeModel, picture: EncodedPicture, text: str, asked: JudgeQuestion) -> JudgeReply:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    question = ChatRequest(
        [{"role": "user", "content": content}], [picture], judge.max_tokens or asked.max_tokens, is_json=asked.is_json
    )
    try:
        answer = judge.model.chat(question)
    except ProviderError as error:
        # Of this one picture; of all other faults the next call would suffer too.
        if error.fault in ("malformed", "refused"):
            return JudgeReply(None, str(error), error.usage, error.fault, _adapted(judge))
        raise
    return JudgeReply(answer.text, None, answer.usage, adapted=_adapted(judge))


def _adapted(judge: JudgeModel) -> tuple[str, ...]:
    """What the judge's endpoint does not take; our own models take everything."""
    return tuple(getattr(judge.model, "adapted", ()))


def _key(picture: EncodedPicture, text: str, attempt: int) -> str:
    digest = hashlib.blake2b(picture.content, digest_size=12)
    digest.update(f"\0{attempt}\0{text}".encode(errors="replace"))
    return digest.hexdigest()


def _read_lines(path: Path) -> Iterator[tuple[str, JudgeReply]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ClvrError(f"{path}: cannot be read ({error.strerror or error})") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = parse_object(line, f"{path}:{number}")
        except ClvrError:
            continue  # cut short when a process ended
        try:
            key, said = entry.text("key"), _stored(entry)
            if said.fault is not None or (said.text or "").strip():
                yield key, said
        except (ClvrError, TypeError) as error:
            raise ClvrError(f"{path}:{number}: not a reply of a judge ({error}); remove the line") from error


def _stored(entry: JsonObject) -> JudgeReply:
    """A reply as `AnswerFile.add` wrote it."""
    usage = entry.nested("usage")
    if unknown := usage.content.keys() - {each.name for each in dataclasses.fields(Usage)}:
        raise ClvrError(f"usage has unknown fields {', '.join(sorted(unknown)):.100}")
    fault: Any = entry.text("fault", None)
    if fault not in (None, "refused", "malformed"):
        raise ClvrError(f"fault must be refused or malformed, got {shown(fault)}")
    numbers: dict[str, Any] = {name: usage.number(name, low=0) for name in usage.content}
    return JudgeReply(
        entry.optional("reply", entry.text),
        entry.optional("error", entry.text),
        Usage(**numbers),
        fault,
        entry.texts("adapted") if "adapted" in entry.content else (),
    )
