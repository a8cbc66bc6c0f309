"""Vision-language models behind an OpenAI-compatible chat endpoint: vLLM, SGLang, Gemini, OpenAI and others."""

from __future__ import annotations

import base64
import codecs
import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from clvr_jax.errors import UsageError
from clvr_jax.files.image_io import EncodedImage, ImageLike, encode_png
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.interfaces import ChatModel, ChatRequest, ChatResponse, Message, ProviderError, Token, Usage
from clvr_jax.interfaces.thoughts import strip_thoughts
from clvr_jax.providers.adaptation import Adaptation, OptionalFields
from clvr_jax.providers.bounded import MAX_VALUES, count
from clvr_jax.providers.endpoint import Connection, Endpoint, Prices
from clvr_jax.providers.failures import Failure

MAX_TOP_LOGPROBS = 20
"""Maximum number of alternatives to a token that the API accepts."""
_OPTIONAL = (
    OptionalFields(("response_format",), ("response_format", "json_object", "json mode"), is_any_mention=True),
    OptionalFields(("logprobs", "top_logprobs"), ("logprob",), is_any_mention=True),
    OptionalFields(("temperature",), consequence="decoding may not be greedy, and replies may differ from run to run"),
    OptionalFields(("seed",), consequence="replies may differ from run to run"),
)
_MAX_BYTES = 32 << 20
"""Maximum size of a response in bytes, more than a reply with its probabilities has; many are read concurrently."""
_VALUES_PER_TOKEN, _MAX_VALUES = 10, 4_000_000
"""JSON values of a token or an alternative, with its bytes; and the maximum number of values of a response."""
_MAX_CHARACTERS, _CHARACTERS_PER_TOKEN = 1 << 20, 500
"""Maximum characters of a reply: the larger of the first, and the second times the maximum number of tokens."""
_MIN_LOGPROB, _MAX_LOGPROB = -1e9, 1e-3
"""Range of accepted log probabilities; values slightly above 0 are due to rounding."""


class OpenAIChatModel(ChatModel):
    """A model behind `/chat/completions`; may be called from many threads at once.

    All images are sent as base64 with every request. A field that the server rejects by name (`response_format`,
    `logprobs`, `temperature`, `seed`) is omitted from then on, and `max_tokens` is sent as `max_completion_tokens` or
    the other way round; `adapted` describes such changes.

    Args:
      endpoint: address and limits.
      json_mode: whether JSON is requested with `response_format`.
      token_limit: the server's name for the maximum number of tokens.
      omit: fields that are never sent, of "temperature" and "seed". Replies may then differ from run to run.
      extra: further fields of the request's body, e.g. {"reasoning_effort": "low"}.
      thought_tokens: tokens added to the limit of each request, for models that think first; servers count thoughts.
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
        extra: Mapping[str, JSON] | None = None,
        thought_tokens: int = 0,
    ):
        if thought_tokens < 0:
            raise UsageError(f"thought_tokens must be at least 0, got {thought_tokens}")
        if unknown := set(omit) - {"temperature", "seed"}:
            raise UsageError(f"omit: only temperature and seed can be omitted, got {', '.join(sorted(unknown))}")
        bounded = dataclasses.replace(endpoint, max_bytes=min(endpoint.max_bytes, _MAX_BYTES))
        self._connection = Connection(bounded)
        self._prices = endpoint.prices
        omitted = [*omit, *([] if json_mode else ["response_format"])]
        self._adaptation = Adaptation(endpoint.name, _OPTIONAL, omitted)
        self._token_limit, self._extra = token_limit, dict(extra or {})
        self._thought_tokens = thought_tokens

    @property
    def name(self) -> str:
        """Model and host."""
        return self._connection.endpoint.name

    @property
    def adapted(self) -> tuple[str, ...]:
        """Descriptions of the fields that were omitted or renamed because the server rejects them."""
        return self._adaptation.notes

    def chat(self, request: ChatRequest) -> ChatResponse:
        """Returns the response to one request.

        Raises: ProviderError; UsageError if image parts and images differ in number.
        """
        request = dataclasses.replace(request, max_tokens=request.max_tokens + self._thought_tokens)
        body = self._body(request)
        rejected, attempts = Usage(), 0
        while True:
            sent = self._adaptation.adapted(body)
            try:
                response = self._chat(request, sent)
            except ProviderError as error:
                if error.fault != "rejected" or not self._adaptation.learn(str(error), sent):
                    raise
                rejected, attempts = rejected + error.usage, attempts + 1
                continue
            if not attempts:
                return response
            usage = rejected + response.usage
            # Several HTTP requests, but one call.
            usage = dataclasses.replace(usage, calls=1, retries=usage.retries + attempts)
            return dataclasses.replace(response, usage=usage)

    def chat_all(self, requests: Sequence[ChatRequest]) -> list[ChatResponse]:
        """Sends requests concurrently, up to the endpoint's `max_in_flight`; returns the responses in order."""
        if len(requests) < 2:
            return [self.chat(request) for request in requests]
        threads = ThreadPoolExecutor(min(len(requests), self._connection.endpoint.max_in_flight))
        try:
            return list(threads.map(self.chat, requests))
        finally:
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def _body(self, request: ChatRequest) -> dict[str, JSON]:
        """Returns the request's body with all fields, before adaptation to the server."""
        body: dict[str, JSON] = {
            "model": self._connection.endpoint.model,
            "messages": chat_messages(request.messages, request.images),
            self._token_limit: request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if request.top_logprobs > 0:
            body |= {"logprobs": True, "top_logprobs": min(request.top_logprobs, MAX_TOP_LOGPROBS)}
        if request.is_json:
            body["response_format"] = {"type": "json_object"}
        return body

    def _chat(self, request: ChatRequest, sent: Mapping[str, JSON]) -> ChatResponse:
        body = {**sent, **self._extra}
        # client.chat.completions.create with its typed requests and responses would double the time of a call, which
        # limits the number of concurrent calls with 64 threads.
        response, usage = self._connection.call(
            lambda client: client.post("/chat/completions", cast_to=str, body=body),
            lambda completion: read_completion(completion, request, self._prices),
            _max_values(request),
        )
        return dataclasses.replace(response, usage=usage)


def _max_values(request: ChatRequest) -> int:
    """Returns the maximum number of values in a response's JSON, from the number of requested probabilities."""
    if request.top_logprobs <= 0:
        return MAX_VALUES
    each = _VALUES_PER_TOKEN * (1 + min(request.top_logprobs, MAX_TOP_LOGPROBS))
    return min(MAX_VALUES + request.max_tokens * each, _MAX_VALUES)


def chat_messages(messages: Sequence[Message], images: Sequence[ImageLike]) -> list[Message]:
    """Converts messages to the API's form: the k-th {"type": "image"} part becomes the k-th image, as a data URL.

    Raises: UsageError if the numbers of images and image parts differ, or for parts of another type.
    """
    image_parts = sum(_is_image(part) for message in messages for part in _parts(message))
    if image_parts != len(images):
        raise UsageError(f"chat request: {image_parts} image parts in the messages but {len(images)} images")
    urls = iter([image_data_url(image) for image in images])
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


def image_data_url(image: ImageLike) -> str:
    """Returns an image as a data URL; an image that is not encoded becomes a PNG."""
    encoded = image if isinstance(image, EncodedImage) else EncodedImage(encode_png(image), "png")
    return f"data:image/{encoded.kind};base64,{base64.b64encode(encoded.content).decode()}"


def read_completion(body: UncheckedJSON, request: ChatRequest, prices: Prices) -> tuple[ChatResponse, Usage]:
    """Reads a chat completion: its text, the probabilities of its tokens, and its usage.

    `tokens` is None if they were not requested, or if those of the server do not match the text.
    Raises: Failure "refused" for a refusal or a content filter; "down" if there is no reply: no text, a truncated text,
      an unfinished thought.
    """
    reported = body.get("usage")
    reported = reported if isinstance(reported, dict) else {}
    usage = prices.usage(count(reported.get("prompt_tokens")), count(reported.get("completion_tokens")))
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Failure("the answer has no choices", "down", can_retry=True, usage=usage)
    reason = choice.get("finish_reason")
    if message.get("refusal") or reason == "content_filter":
        refusal = message.get("refusal") or "content filter"
        raise Failure(f"refused: {str(refusal)[:1000]}", "refused", usage=usage)
    content = _text_of(message.get("content"))
    if reason == "length":
        # No retry: the same request would be truncated at the same token and paid for again.
        what = "the answer is truncated" if content.strip() else "the answer is empty, truncated"
        advice = f"{what} at max_tokens={request.max_tokens}; allow more tokens, or have the model think less"
        raise Failure(advice, "down", usage=usage, is_no_reply=True)
    if len(content) > max(_MAX_CHARACTERS, _CHARACTERS_PER_TOKEN * request.max_tokens):
        # It would be stored, and sent with later requests.
        raise Failure(
            f"the answer has {len(content):,} characters, far more than max_tokens={request.max_tokens}",
            "down",
            usage=usage,
            is_no_reply=True,
        )
    reply = strip_thoughts(content)
    if reply is None or not reply.strip():
        what = "the answer is empty" if not content.strip() else "the answer is a thought without a reply"
        raise Failure(what, "down", can_retry=True, usage=usage, is_no_reply=True)
    content = reply
    tokens = read_tokens(choice.get("logprobs"), content) if request.top_logprobs > 0 else None
    return ChatResponse(content, tokens=tokens), usage


def read_tokens(logprobs: object, text: str) -> tuple[Token, ...] | None:
    """Reads the tokens of a text with their probabilities.

    Tokens before and after the text (a thought, the end of the turn) are omitted, so that the concatenated tokens are
    the text.

    Args:
      logprobs: `choices[0].logprobs` of a chat completion.
      text: `choices[0].message.content` of the same completion.
    Returns: the tokens; None if they are absent or malformed, or do not contain the text.
    """
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(entries, list) or not entries:
        return None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts, values, tops = [], [], []
    for entry in entries:
        found = _token(entry)
        alternatives = entry.get("top_logprobs") if found else None
        read = [_token(each) for each in alternatives] if isinstance(alternatives, list) else []
        if found is None or None in read or not (alternatives is None or isinstance(alternatives, list)):
            return None
        content = entry.get("bytes")
        # A character may consist of bytes of several tokens; it is assigned to the last of them.
        texts.append(decoder.decode(bytes(content)) if _is_bytes(content) else found[0])
        values.append(found[1])
        tops.append(dict(each for each in read if each is not None))
    start = "".join(texts).rfind(text)
    if start < 0:
        return None
    tokens, begin, stop = [], 0, start + len(text)
    for token, value, top in zip(texts, values, tops, strict=True):
        end = begin + len(token)
        if end > start and begin < stop:
            tokens.append(Token(token[max(0, start - begin) : stop - begin], value, top))
        begin = end
    return tuple(tokens)


def _token(entry: object) -> tuple[str, float] | None:
    """Returns text and log probability of one entry; None if it is malformed."""
    if not isinstance(entry, dict):
        return None
    text, value = entry.get("token"), entry.get("logprob")
    if not isinstance(text, str) or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not _MIN_LOGPROB <= value <= _MAX_LOGPROB:
        return None
    return text, min(float(value), 0.0)


def _is_bytes(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 256 for each in value)


def _text_of(content: object) -> str:
    """Returns the text of a message, which may be a list of parts; "" if there is none."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _parts(message: Message) -> list[JSON]:
    return [] if isinstance(message["content"], str) else list(message["content"])


def _is_image(part: JSON) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _text(part: JSON) -> dict[str, JSON]:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise UsageError(f"chat request: a part of a message is neither text nor image: {str(part)[:80]}")
    return {"type": "text", "text": part["text"]}
