"""Vision-language models behind an OpenAI-compatible chat endpoint: vLLM, SGLang, Gemini, OpenAI and others."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from clvr_jax.errors import UsageError
from clvr_jax.providers.endpoint import Connection, Endpoint, Failure, Prices, count
from clvr_jax.reasoning.context import Message
from clvr_jax.reasoning.images import EncodedPicture, Picture, encode_png
from clvr_jax.reasoning.tools import Answer, ProviderError, Question, Usage, VisionLanguageModel

_JSON_MODE_WORDS = ("response_format", "json_object", "json mode")


class OpenAIVisionLanguageModel(VisionLanguageModel):
    """A model behind `/chat/completions`; may be asked from many threads at once.

    Pictures are sent as base64, every one with every question.

    Args:
      endpoint: where it is served, and how it may be called.
      json_mode: whether JSON is asked for with `response_format`; given up for good when the server rejects that.
      token_limit: what the server calls the most tokens of an answer; OpenAI's own newer models want
        "max_completion_tokens".
      omit: of "temperature" and "seed", what is not sent, since the server rejects it. Answers may then differ from
        run to run.
      extra: further fields of the request's body, e.g. {"reasoning_effort": "low"}.
    Raises: ClvrError if the key or the openai package is missing.
    Source: OpenAI API reference, chat completions.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        json_mode: bool = True,
        token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        omit: Sequence[Literal["temperature", "seed"]] = (),
        extra: Mapping[str, Any] | None = None,
    ):
        if unknown := set(omit) - {"temperature", "seed"}:
            raise UsageError(f"omit: only temperature and seed can be left out, got {', '.join(sorted(unknown))}")
        self._connection = Connection(endpoint)
        self._prices = endpoint.prices
        self._json_mode, self._token_limit = json_mode, token_limit
        self._omit, self._extra = frozenset(omit), dict(extra or {})

    @property
    def name(self) -> str:
        """The model and who serves it."""
        return self._connection.endpoint.name

    def ask(self, question: Question) -> Answer:
        """See `VisionLanguageModel`. Raises: ProviderError; UsageError if image parts and images differ in number."""
        messages = chat_messages(question.messages, question.images)
        use_json_mode = question.is_json and self._json_mode
        try:
            return self._ask(question, messages, use_json_mode)
        except ProviderError as error:
            said = str(error).lower()
            if not use_json_mode or error.fault != "rejected" or not any(word in said for word in _JSON_MODE_WORDS):
                raise
            rejected = error.usage
        self._json_mode = False
        answer = self._ask(question, messages, False)
        usage = rejected + answer.usage
        # Two requests, but one question.
        return dataclasses.replace(answer, usage=dataclasses.replace(usage, calls=1, retries=usage.retries + 1))

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def _ask(self, question: Question, messages: list[Message], use_json_mode: bool) -> Answer:
        request: dict[str, Any] = {
            "model": self._connection.endpoint.model,
            "messages": messages,
            self._token_limit: question.max_tokens,
            "temperature": question.temperature,
            "seed": question.seed,
        }
        request = {key: value for key, value in request.items() if key not in self._omit} | self._extra
        if use_json_mode:
            request["response_format"] = {"type": "json_object"}
        # Not client.chat.completions.create: its typed requests and answers cost as much again as the rest of a call,
        # and with 64 threads that is what limits the number of calls in flight.
        text, usage = self._connection.call(
            lambda client: client.post("/chat/completions", cast_to=str, body=request),
            lambda body: read_completion(body, question, self._prices),
        )
        return Answer(text, usage)


def chat_messages(messages: Sequence[Message], images: Sequence[Picture]) -> list[Message]:
    """Messages in the endpoint's form: the k-th {"type": "image"} part becomes the k-th picture, as a data URL.

    Raises: UsageError if there are more or fewer pictures than such parts, or for parts of another kind.
    """
    places = sum(_is_image(part) for message in messages for part in _parts(message))
    if places != len(images):
        raise UsageError(f"question: {places} image parts in the messages but {len(images)} images")
    urls = iter([picture_url(image) for image in images])
    converted = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": next(urls)}} if _is_image(part) else _text(part)
                for part in content
            ]
        converted.append({"role": message["role"], "content": content})
    return converted


def picture_url(picture: Picture) -> str:
    """The picture as a data URL: of the file that it is, else of a PNG."""
    file = picture if isinstance(picture, EncodedPicture) else EncodedPicture(encode_png(picture), "png")
    return f"data:image/{file.kind};base64,{base64.b64encode(file.content).decode()}"


def read_completion(body: Mapping[str, Any], question: Question, prices: Prices) -> tuple[str, Usage]:
    """The text of a chat completion, and its price.

    Raises: Failure "refused" for a refusal or a content filter, "malformed" if there is no text.
    """
    told = body.get("usage")
    told = told if isinstance(told, dict) else {}
    usage = prices.usage(count(told.get("prompt_tokens")), count(told.get("completion_tokens")))
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Failure("the answer has no choices", "malformed", can_retry=True, usage=usage)
    reason = choice.get("finish_reason")
    if message.get("refusal") or reason == "content_filter":
        said = message.get("refusal") or "content filter"
        raise Failure(f"refused: {str(said)[:1000]}", "refused", usage=usage)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    cut = f", cut at max_tokens={question.max_tokens}" if reason == "length" else ""
    # The same question would be answered the same way, and paid again: no retry, the caller may ask otherwise.
    if not isinstance(content, str) or not content.strip():
        raise Failure(f"the answer is empty{cut}", "malformed", usage=usage)
    return content, usage


def _parts(message: Message) -> list[Any]:
    return [] if isinstance(message["content"], str) else list(message["content"])


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _text(part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise UsageError(f"question: a part of a message is neither text nor image: {str(part)[:80]}")
    return {"type": "text", "text": part["text"]}
