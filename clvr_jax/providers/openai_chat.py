"""Vision-language models behind an OpenAI-compatible chat endpoint: vLLM, SGLang, Gemini, OpenAI and others."""

from __future__ import annotations

import base64
import codecs
import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from clvr_jax.errors import UsageError
from clvr_jax.image_io import EncodedPicture, ImageLike, encode_png
from clvr_jax.interfaces import ChatModel, ChatRequest, ChatResponse, ProviderError, Token, Usage
from clvr_jax.providers.adaptation import Adaptation, OptionalFields
from clvr_jax.providers.bounded import MAX_VALUES, count
from clvr_jax.providers.endpoint import Connection, Endpoint, Prices
from clvr_jax.providers.failures import Failure
from clvr_jax.reasoning.context import Message
from clvr_jax.reasoning.thoughts import strip_thoughts

MAX_TOP_LOGPROBS = 20
"""Most alternatives to a token that the API may be asked for."""
_OPTIONAL = (
    OptionalFields(("response_format",), ("response_format", "json_object", "json mode"), is_any_mention=True),
    OptionalFields(("logprobs", "top_logprobs"), ("logprob",), is_any_mention=True),
    OptionalFields(("temperature",), consequence="greedy replies are not sure, and may differ from run to run"),
    OptionalFields(("seed",), consequence="replies may differ from run to run"),
)
_MAX_BYTES = 32 << 20
"""Most bytes of a reply: what is larger than a text with its probabilities is no reply, and many are read at a time."""
_VALUES_OF_A_TOKEN, _MOST_VALUES = 10, 4_000_000
"""Values in the JSON of a token or of an alternative to it, with its bytes; and of all of them, at most."""
_MAX_TEXT, _CHARACTERS_OF_A_TOKEN = 1 << 20, 500
"""Characters of a reply: no more than the first, or than the second for each token that was asked for."""
_LOWEST, _ROUNDING = 1e9, 1e-3
"""Logarithms of probabilities lie between minus the first and, by rounding, the second."""


class OpenAIChatModel(ChatModel):
    """A model behind `/chat/completions`; may be asked from many threads at once.

    Images are sent as base64, every one with every question. Probabilities of tokens are asked for where a question
    wants them. A field that the server refuses by name (`response_format`, `logprobs`, `temperature`, `seed`) is left
    out from then on, and `max_tokens` is sent as `max_completion_tokens` or the other way round; `adapted` says so.

    Args:
      endpoint: where it is served, and how it may be called.
      json_mode: whether JSON is asked for with `response_format`.
      token_limit: what the server calls the most tokens of an answer.
      omit: of "temperature" and "seed", what is not sent from the beginning. Answers may then differ from run to run.
      extra: further fields of the request's body, e.g. {"reasoning_effort": "low"}.
      thought_tokens: tokens beyond the limit of each question, for models that think first: servers count thoughts.
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
        thought_tokens: int = 0,
    ):
        if thought_tokens < 0:
            raise UsageError(f"thought_tokens must be at least 0, got {thought_tokens}")
        if unknown := set(omit) - {"temperature", "seed"}:
            raise UsageError(f"omit: only temperature and seed can be left out, got {', '.join(sorted(unknown))}")
        bounded = dataclasses.replace(endpoint, max_bytes=min(endpoint.max_bytes, _MAX_BYTES))
        self._connection = Connection(bounded)
        self._prices = endpoint.prices
        without = [*omit, *([] if json_mode else ["response_format"])]
        self._adaptation = Adaptation(endpoint.name, _OPTIONAL, without)
        self._token_limit, self._extra = token_limit, dict(extra or {})
        self._thought_tokens = thought_tokens

    @property
    def name(self) -> str:
        """The model and who serves it."""
        return self._connection.endpoint.name

    @property
    def adapted(self) -> tuple[str, ...]:
        """Says which fields are not sent as they were asked for, since the server refused them."""
        return self._adaptation.notes

    def chat(self, question: ChatRequest) -> ChatResponse:
        """Asks one question.

        Raises: ProviderError; UsageError if image parts and images differ in number.
        """
        question = dataclasses.replace(question, max_tokens=question.max_tokens + self._thought_tokens)
        wanted = self._request(question)
        rejected, requests = Usage(), 0
        while True:
            sent = self._adaptation.adapted(wanted)
            try:
                answer = self._chat(question, sent)
            except ProviderError as error:
                if error.fault != "rejected" or not self._adaptation.learn(str(error), sent):
                    raise
                rejected, requests = rejected + error.usage, requests + 1
                continue
            if not requests:
                return answer
            usage = rejected + answer.usage
            # Several requests, but one question.
            usage = dataclasses.replace(usage, calls=1, retries=usage.retries + requests)
            return dataclasses.replace(answer, usage=usage)

    def chat_all(self, questions: Sequence[ChatRequest]) -> list[ChatResponse]:
        """Asks questions side by side, at most the endpoint's `max_in_flight` at a time; answers are in order."""
        if len(questions) < 2:
            return [self.chat(question) for question in questions]
        threads = ThreadPoolExecutor(min(len(questions), self._connection.endpoint.max_in_flight))
        try:
            return list(threads.map(self.chat, questions))
        finally:
            threads.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def _request(self, question: ChatRequest) -> dict[str, Any]:
        """The request's body with every field that is wanted."""
        request: dict[str, Any] = {
            "model": self._connection.endpoint.model,
            "messages": chat_messages(question.messages, question.images),
            self._token_limit: question.max_tokens,
            "temperature": question.temperature,
            "seed": question.seed,
        }
        if question.top_logprobs > 0:
            request |= {"logprobs": True, "top_logprobs": min(question.top_logprobs, MAX_TOP_LOGPROBS)}
        if question.is_json:
            request["response_format"] = {"type": "json_object"}
        return request

    def _chat(self, question: ChatRequest, sent: Mapping[str, Any]) -> ChatResponse:
        request = {**sent, **self._extra}
        # Not client.chat.completions.create: its typed requests and answers cost as much again as the rest of a call,
        # and with 64 threads that is what limits the number of calls in flight.
        answer, usage = self._connection.call(
            lambda client: client.post("/chat/completions", cast_to=str, body=request),
            lambda body: read_completion(body, question, self._prices),
            _max_values(question),
        )
        return dataclasses.replace(answer, usage=usage)


def _max_values(question: ChatRequest) -> int:
    """Most values in the JSON of a response: as many as the tokens that are asked for, with their probabilities."""
    if question.top_logprobs <= 0:
        return MAX_VALUES
    each = _VALUES_OF_A_TOKEN * (1 + min(question.top_logprobs, MAX_TOP_LOGPROBS))
    return min(MAX_VALUES + question.max_tokens * each, _MOST_VALUES)


def chat_messages(messages: Sequence[Message], images: Sequence[ImageLike]) -> list[Message]:
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


def picture_url(picture: ImageLike) -> str:
    """The picture as a data URL: of the file that it is, else of a PNG."""
    file = picture if isinstance(picture, EncodedPicture) else EncodedPicture(encode_png(picture), "png")
    return f"data:image/{file.kind};base64,{base64.b64encode(file.content).decode()}"


def read_completion(body: Mapping[str, Any], question: ChatRequest, prices: Prices) -> tuple[ChatResponse, Usage]:
    """Reads a chat completion: its text with the probabilities of its tokens, and its price.

    `tokens` is None if the question did not ask for them, or if the server sent none that fit the text.
    Raises: Failure "refused" for a refusal or a content filter, "down" if there is no reply: no text, a text that was
      cut, a thought without an end.
    """
    told = body.get("usage")
    told = told if isinstance(told, dict) else {}
    usage = prices.usage(count(told.get("prompt_tokens")), count(told.get("completion_tokens")))
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Failure("the answer has no choices", "down", can_retry=True, usage=usage)
    reason = choice.get("finish_reason")
    if message.get("refusal") or reason == "content_filter":
        said = message.get("refusal") or "content filter"
        raise Failure(f"refused: {str(said)[:1000]}", "refused", usage=usage)
    content = _text_of(message.get("content"))
    if reason == "length":
        # The same question would be cut in the same place, and paid again: no retry, the caller may ask otherwise.
        what = "the answer is cut" if content.strip() else "the answer is empty, cut"
        advice = f"{what} at max_tokens={question.max_tokens}; allow more tokens, or have the model think less"
        raise Failure(advice, "down", usage=usage, is_no_reply=True)
    if len(content) > max(_MAX_TEXT, _CHARACTERS_OF_A_TOKEN * question.max_tokens):
        # It would be stored, and sent on.
        raise Failure(
            f"the answer has {len(content):,} characters, far more than max_tokens={question.max_tokens}",
            "down",
            usage=usage,
            is_no_reply=True,
        )
    reply = strip_thoughts(content)
    if reply is None or not reply.strip():
        what = "the answer is empty" if not content.strip() else "the answer is a thought without a reply"
        raise Failure(what, "down", can_retry=True, usage=usage, is_no_reply=True)
    content = reply
    tokens = read_tokens(choice.get("logprobs"), content) if question.top_logprobs > 0 else None
    return ChatResponse(content, tokens=tokens), usage


def read_tokens(logprobs: object, text: str) -> tuple[Token, ...] | None:
    """Reads the tokens of a text with their probabilities, as servers send them.

    Tokens before and after the text (a model's thinking, the end of the turn) are left out, so that the tokens' texts
    put together are the text.

    Args:
      logprobs: `choices[0].logprobs` of a chat completion.
      text: `choices[0].message.content` of the same one.
    Returns: the tokens; None if they are absent or malformed, or do not hold the text.
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
        # A character may be spread over several tokens: their bytes tell, it counts as text of the last of them.
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
    """The text and the logarithm of the probability of one entry; None if it is malformed."""
    if not isinstance(entry, dict):
        return None
    text, value = entry.get("token"), entry.get("logprob")
    if not isinstance(text, str) or isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not -_LOWEST <= value <= _ROUNDING:
        return None
    return text, min(float(value), 0.0)


def _is_bytes(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 256 for each in value)


def _text_of(content: object) -> str:
    """The text of a message, which may come in parts; "" if there is none."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _parts(message: Message) -> list[Any]:
    return [] if isinstance(message["content"], str) else list(message["content"])


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _text(part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise UsageError(f"question: a part of a message is neither text nor image: {str(part)[:80]}")
    return {"type": "text", "text": part["text"]}
