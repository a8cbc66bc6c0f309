"""Asks a judge about pictures: many questions in flight, every answer on disk as it comes, none asked twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.benchmark import Asked
from clvr_jax.json_input import parse_object
from clvr_jax.outputs import name_for
from clvr_jax.reasoning.answers import AnswerError
from clvr_jax.reasoning.images import EncodedPicture
from clvr_jax.reasoning.tools import ProviderError, Question, Usage, VisionLanguageModel


@dataclass(frozen=True)
class JudgeModel:
    """Who looks.

    model: asked at temperature 0. revision: of its weights, as far as anybody knows. in_flight: questions at once.
    max_tokens: of a reply, for models that think before they answer; the benchmark's own number if None.
    """

    model: VisionLanguageModel
    revision: str | None = None
    in_flight: int = 64
    max_tokens: int | None = None


@dataclass(frozen=True)
class Subject:
    """A picture to be looked at: its name in the file of answers, how it is read, and what is asked about it."""

    name: str
    load: Callable[[], EncodedPicture]
    questions: Sequence[Asked]


@dataclass(frozen=True)
class Said:
    """A judge's reply. text: None if it gave none, then `error` says why."""

    text: str | None
    error: str | None
    usage: Usage


class AnswerFile:
    """All replies of one judge about one folder of pictures, one JSON object a line, appended as they come.

    A reply is found again by the picture's bytes and the question's text, so a picture that was drawn anew is looked at
    anew. A line that was cut short by the end of a process is left out.

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

    def get(self, key: str) -> Said | None:
        """A reply that was given before."""
        return self._said.get(key)

    def add(self, key: str, subject: str, question: str, said: Said) -> None:
        """Writes a reply down. Raises: ClvrError if that fails."""
        usage = {name: value for name, value in dataclasses.asdict(said.usage).items() if value}
        entry = {"key": key, "picture": subject, "question": question, "reply": said.text, "error": said.error}
        line = json.dumps({**entry, "usage": usage}, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise ClvrError(f"{self._path}: cannot be written ({error.strerror or error})") from error
            self._said[key] = said

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def ask_all(
    judge: JudgeModel,
    subjects: Sequence[Subject],
    answers: AnswerFile,
    attempts: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[dict[str, Any]], Usage]:
    """Asks every question about every picture.

    A reply that cannot be read is asked for again, with what was wrong with it, up to `attempts` times in all. The
    questions about one picture come one after the other, those about others at the same time.

    Args:
      judge: who is asked.
      subjects: the pictures.
      answers: replies known before, and where new ones go.
      attempts: at least 1.
      on_progress: called with (pictures done, pictures in all).
    Returns: for each picture {name of the question: what was read, None if nothing could be}; and what all replies that
      were used cost, those of earlier runs included.
    Raises: ClvrError if the judge cannot be asked, or a picture cannot be read; replies that came before are kept.
    """
    done, lock = 0, threading.Lock()

    def look(subject: Subject) -> tuple[dict[str, Any], Usage]:
        nonlocal done
        picture = subject.load()
        found, spent = {}, Usage()
        for asked in subject.questions:
            found[asked.name], usage = _answer(judge, subject.name, picture, asked, answers, attempts)
            spent += usage
        with lock:
            done += 1
            if on_progress:
                on_progress(done, len(subjects))
        return found, spent

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
    results = [future.result() for future in futures]
    return [found for found, _ in results], sum((spent for _, spent in results), Usage())


def _answer(
    judge: JudgeModel, subject: str, picture: EncodedPicture, asked: Asked, answers: AnswerFile, attempts: int
) -> tuple[Any, Usage]:
    """What one question found out, None if it could not be; and what its replies cost."""
    complaint, spent = "", Usage()
    for attempt in range(attempts):
        text = asked.text + complaint
        key = _key(picture, text, attempt)
        said = answers.get(key)
        if said is None:
            said = _said(judge, picture, text, asked)
            answers.add(key, subject, asked.name, said)
        spent += said.usage
        if said.text is None:
            continue
        try:
            return asked.read(said.text), spent
        except AnswerError as error:
            complaint = f"\nYour last answer could not be used: {error}\n"
    return None, spent


def _said(judge: JudgeModel, picture: EncodedPicture, text: str, asked: Asked) -> Said:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    question = Question(
        [{"role": "user", "content": content}], [picture], judge.max_tokens or asked.max_tokens, is_json=asked.is_json
    )
    try:
        answer = judge.model.ask(question)
    except ProviderError as error:
        # Of this one picture; of all other faults the next call would suffer too.
        if error.fault in ("malformed", "refused"):
            return Said(None, str(error), error.usage)
        raise
    return Said(answer.text, None, answer.usage)


def _key(picture: EncodedPicture, text: str, attempt: int) -> str:
    digest = hashlib.blake2b(picture.content, digest_size=12)
    digest.update(f"\0{attempt}\0{text}".encode(errors="replace"))
    return digest.hexdigest()


def _read_lines(path: Path) -> Iterator[tuple[str, Said]]:
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
            usage = Usage(**entry.nested("usage").content)
            yield (
                entry.text("key"),
                Said(entry.optional("reply", entry.text), entry.optional("error", entry.text), usage),
            )
        except (ClvrError, TypeError) as error:
            raise ClvrError(f"{path}:{number}: not a reply of a judge ({error}); remove the line") from error
