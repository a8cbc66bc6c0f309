"""Questions to a judge about images, asked concurrently; every reply is stored on disk, and none is requested twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.judging.benchmark import Answer, JudgeQuestion
from clvr_jax.files.atomic_io import open_lines
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.image_io import EncodedImage
from clvr_jax.files.json_input import JSON, JsonObject, parse_object, shown, stream_lines
from clvr_jax.files.output_paths import output_name
from clvr_jax.interfaces import ChatModel, ChatRequest, ChatResponse, ProviderError, Usage
from clvr_jax.interfaces.answers import AnswerError


@dataclass(frozen=True)
class JudgeModel:
    """The model that judges images.

    model: called with temperature 0. revision: of its weights, if known. in_flight: maximum number of concurrent
    questions. max_tokens: of a reply, for models that think first; the benchmark's own number if None.
    """

    model: ChatModel
    revision: str | None = None
    in_flight: int = 64
    max_tokens: int | None = None


@dataclass(frozen=True)
class JudgeTask(Generic[Answer]):
    """An image and the questions about it.

    name: in the file of replies. load: reads the image. questions: asked one after the other.
    """

    name: str
    load: Callable[[], EncodedImage]
    questions: Sequence[JudgeQuestion[Answer]]


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply.

    text: None without a reply; then `error` is the reason, and `fault` says whether the judge refused or its response
    was malformed. usage: cost of the reply. adapted: descriptions of the changes to requests that its server required.
    """

    text: str | None
    error: str | None
    usage: Usage
    fault: Literal["refused", "malformed"] | None = None
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged(Generic[Answer]):
    """The judgment of one image.

    Attributes:
      found: name of the question -> parsed reply; None if no reply could be parsed.
      usage: of all replies that were used, including those of earlier runs.
      is_refused: whether the judge's policy refused a question in the last attempt.
      adapted: as in `JudgeReply`, of all replies.
    """

    found: Mapping[str, Answer | None]
    usage: Usage
    is_refused: bool
    adapted: frozenset[str]


_FAULTS: Mapping[str, Literal["refused", "malformed"]] = {"refused": "refused", "malformed": "malformed"}
_TOP_LOGPROBS = 20
"""Number of probable first tokens that are requested, the most that endpoints allow."""
_MAX_LINE_BYTES = 64 << 20
"""Maximum size of a line: that of a response."""


class ReplyFile:
    """A file with all replies of one judge about a directory of images, one JSON object per line.

    A reply is identified by the bytes of the image and the text of the question, so that a new image is judged again.
    An incomplete last line of an interrupted process is ignored, and so is a line of an earlier version with neither a
    reply nor the information whether the judge refused; such questions are asked again.

    Args:
      directory: of the file.
      judge: gave the replies.
    """

    def __init__(self, directory: Path, judge: JudgeModel):
        self._path = directory / f"{output_name(judge.model.name, judge.revision)}.jsonl"
        self._replies = dict(_read_lines(self._path)) if has_entry(self._path) else {}
        self._lock = threading.Lock()
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open_lines(self._path)
        except OSError as error:
            raise ClvrError(f"{self._path}: cannot be written ({error.strerror or error})") from error

    def get(self, key: str) -> JudgeReply | None:
        """Returns a reply of this or an earlier run; None if there is none."""
        return self._replies.get(key)

    def add(self, key: str, image: str, question: str, reply: JudgeReply) -> None:
        """Appends a reply to the file. Raises: ClvrError if it cannot be written."""
        usage = {name: value for name, value in dataclasses.asdict(reply.usage).items() if value}
        entry: dict[str, JSON] = {
            "key": key,
            "picture": image,
            "question": question,
            "reply": reply.text,
            "error": reply.error,
        }
        if reply.fault is not None:
            entry["fault"] = reply.fault
        if reply.adapted:
            entry["adapted"] = list(reply.adapted)
        # Lone surrogates become escapes of JSON.
        line = json.dumps({**entry, "usage": usage}, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with self._lock:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise ClvrError(f"{self._path}: cannot be written ({error.strerror or error})") from error
            self._replies[key] = reply

    def rename_unreadable(self) -> Path:
        """Renames the file, so that every question is asked again; returns its new path.

        Raises: ClvrError if it cannot be renamed.
        """
        renamed = self._path.with_suffix(".unreadable")
        try:
            self._file.close()
            self._path.replace(renamed)
        except OSError as error:
            raise ClvrError(f"{self._path}: cannot be renamed ({error.strerror or error}); remove it") from error
        return renamed

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def judge_images(
    judge: JudgeModel,
    tasks: Sequence[JudgeTask[Answer]],
    replies: ReplyFile,
    attempts: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Judged[Answer]]:
    """Asks every question about every image.

    If a reply cannot be parsed, the question is asked again with the parser's error, up to `attempts` times in all. The
    questions about one image are asked one after the other, those about different images concurrently.

    Args:
      judge: the model.
      tasks: images and questions.
      replies: earlier replies; new ones are added.
      attempts: at least 1.
      on_progress: called with (images done, all images).
    Returns: the judgment of each image.
    Raises: ClvrError if the judge cannot be reached, or an image cannot be read; earlier replies are kept. Also if no
      reply about several images can be parsed: this is a fault of the server, not of the images, so nothing is scored,
      and the next run asks again.
    """
    done, lock, first_reply = 0, threading.Lock(), ""

    def judge_image(task: JudgeTask[Answer]) -> Judged[Answer]:
        nonlocal done, first_reply
        image = task.load()
        found: dict[str, Answer | None] = {}
        given: list[JudgeReply] = []
        is_refused = False
        for question in task.questions:
            asked = _ask(judge, task.name, image, question, replies, attempts)
            found[question.name] = asked.answer
            is_refused |= asked.answer is None and asked.replies[-1].fault == "refused"
            given += asked.replies
        with lock:
            done += 1
            first_reply = first_reply or given[-1].text or ""
            if on_progress:
                on_progress(done, len(tasks))
        usage = sum((reply.usage for reply in given), Usage())
        return Judged(found, usage, is_refused, frozenset(note for reply in given for note in reply.adapted))

    if on_progress:
        on_progress(0, len(tasks))
    with ThreadPoolExecutor(judge.in_flight, thread_name_prefix="judge") as pool:
        futures = [pool.submit(judge_image, task) for task in tasks]
        finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
        failed = next((error for future in finished if (error := future.exception()) is not None), None)
        if failed is not None:
            pool.shutdown(cancel_futures=True)
            if not isinstance(failed, ClvrError):
                raise failed
            kept = f"; {done} of {len(tasks)} images are judged, and their replies are kept; run again to resume"
            raise ClvrError(f"{failed}{kept}") from failed
    judged = [future.result() for future in futures]
    if len(judged) > 1 and not any(about.is_refused or any(map(_is_parsed, about.found.values())) for about in judged):
        first, renamed = " ".join(first_reply.split())[:120], replies.rename_unreadable()
        raise ClvrError(
            f"{judge.model.name}: none of its replies about {len(judged)} images can be parsed (the first: "
            f"{first!r}), so nothing is scored; they are kept in {renamed}; check the server, or choose another judge, "
            "and run again"
        )
    return judged


def _is_parsed(value: object) -> bool:
    return value is not None


@dataclass(frozen=True)
class _Asked(Generic[Answer]):
    """The parsed reply to a question, None if no reply could be parsed, and all replies, at least one."""

    answer: Answer | None
    replies: list[JudgeReply]


def _ask(
    judge: JudgeModel,
    name: str,
    image: EncodedImage,
    question: JudgeQuestion[Answer],
    replies: ReplyFile,
    attempts: int,
) -> _Asked[Answer]:
    """Asks one question until its reply can be parsed."""
    complaint, given = "", list[JudgeReply]()
    for attempt in range(attempts):
        text = question.text + complaint
        key = _key(image, _asked_text(question, text), attempt)
        reply = replies.get(key)
        if reply is None:
            reply = _reply(judge, image, text, question)
            replies.add(key, name, question.name, reply)
        given.append(reply)
        if reply.text is None:
            continue
        try:
            return _Asked(question.read(reply.text), given)
        except AnswerError as error:
            complaint = f"\nYour last answer could not be used: {error}\n"
    return _Asked(None, given)


def _reply(judge: JudgeModel, image: EncodedImage, text: str, question: JudgeQuestion[Answer]) -> JudgeReply:
    content = [{"type": "image"}, {"type": "text", "text": text}][:: 1 if question.image_first else -1]
    system = [{"role": "system", "content": question.system}] if question.system else []
    request = ChatRequest(
        [*system, {"role": "user", "content": content}],
        [image],
        judge.max_tokens or question.max_tokens,
        is_json=question.is_json,
        top_logprobs=_TOP_LOGPROBS if question.words else 0,
    )
    try:
        response = judge.model.chat(request)
    except ProviderError as error:
        # These faults concern this image only; all others would affect the next call, too.
        if error.fault in ("malformed", "refused"):
            return JudgeReply(None, str(error), error.usage, error.fault, _adapted(judge))
        raise
    reply = response.text
    if question.words:
        probability = first_word_probability(response, question.words)
        if probability is None:
            raise ClvrError(
                f"{judge.model.name}: gives no probabilities of tokens, of which this score is made; choose a judge "
                "whose server returns logprobs, or a directory of a Qwen3-VL"
            )
        reply = repr(probability)
    return JudgeReply(reply, None, response.usage, adapted=_adapted(judge))


def first_word_probability(response: ChatResponse, words: Sequence[str]) -> float | None:
    """Returns the probability that a reply begins with one of the words; None without probabilities of tokens.

    Case and a space before the word do not count. If none of the most probable first tokens is one of the words, the
    result is the probability of the last of them, which is an upper bound for each spelling.
    """
    if not response.tokens:
        return None
    first = response.tokens[0]
    listed = {**first.top, first.text: first.logprob}
    found = [math.exp(logprob) for text, logprob in listed.items() if text.strip().lower() in words]
    return min(math.fsum(found), 1.0) if found else math.exp(min(listed.values()))


def _adapted(judge: JudgeModel) -> tuple[str, ...]:
    """Returns descriptions of the changes to requests that the judge's server required; () for our own models."""
    return tuple(getattr(judge.model, "adapted", ()))


def _asked_text(question: JudgeQuestion[Answer], text: str) -> str:
    """Returns all that the judge reads but the image, and the words that are looked for, as one text."""
    order = () if question.image_first else ("text first",)
    return "\0".join((text, *question.words, *filter(None, (question.system,)), *order))


def _key(image: EncodedImage, text: str, attempt: int) -> str:
    digest = hashlib.blake2b(image.content, digest_size=12)
    digest.update(f"\0{attempt}\0{text}".encode(errors="replace"))
    return digest.hexdigest()


def _read_lines(path: Path) -> Iterator[tuple[str, JudgeReply]]:
    for where, line in stream_lines(path, _MAX_LINE_BYTES):
        if not line:
            continue
        try:
            entry = parse_object(line, where)
        except ClvrError:
            continue  # incomplete, because a process was interrupted
        try:
            key, reply = entry.text("key"), _stored(entry)
            if reply.fault is not None or (reply.text or "").strip():
                yield key, reply
        except (ClvrError, TypeError) as error:
            raise ClvrError(f"{where}: not a reply of a judge ({error}); remove the line") from error


def _usage(stored: JsonObject) -> Usage:
    """Reads a usage; fields that are 0 are not stored. Raises: ClvrError for a wrong type, and for an unknown field."""
    if unknown := stored.content.keys() - {each.name for each in dataclasses.fields(Usage)}:
        raise ClvrError(f"usage has unknown fields {', '.join(sorted(unknown)):.100}")
    return Usage(
        calls=stored.integer("calls", 0, low=0),
        input_tokens=stored.integer("input_tokens", 0, low=0),
        output_tokens=stored.integer("output_tokens", 0, low=0),
        pictures=stored.integer("pictures", 0, low=0),
        nfe=stored.integer("nfe", 0, low=0),
        seconds=stored.number("seconds", 0.0, low=0),
        dollars=stored.number("dollars", 0.0, low=0),
        retries=stored.integer("retries", 0, low=0),
    )


def _stored(entry: JsonObject) -> JudgeReply:
    """Returns a reply that `ReplyFile.add` wrote."""
    usage = _usage(entry.nested("usage"))
    given = entry.text("fault", None)
    fault = None if given is None else _FAULTS.get(given)
    if given is not None and fault is None:
        raise ClvrError(f"fault must be refused or malformed, got {shown(given)}")
    return JudgeReply(
        entry.optional("reply", entry.text),
        entry.optional("error", entry.text),
        usage,
        fault,
        entry.texts("adapted") if "adapted" in entry.content else (),
    )
