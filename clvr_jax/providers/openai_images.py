"""Image tools behind an OpenAI-compatible images endpoint: GPT-Image, DALL-E, Seedream and compatible servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.image_io import decode_image, encode_png, lazy_image
from clvr_jax.interfaces import ImageModel, ImageRequest, ImageResponse, ProviderError, Usage
from clvr_jax.providers.adaptation import Adaptation, OptionalFields
from clvr_jax.providers.base64_text import decode_base64, read_data_url
from clvr_jax.providers.bounded import count
from clvr_jax.providers.endpoint import Connection, Endpoint, Prices
from clvr_jax.providers.failures import Failure
from clvr_jax.providers.openai_chat import picture_url

_MAX_UNASKED_PIXELS = 2**24
"""Most pixels of an image for which no size was asked: 4096 x 4096."""
_OPTIONAL = (
    OptionalFields(("response_format",)),
    OptionalFields(("seed",), consequence="images may differ from run to run"),
)


class OpenAIImageModel(ImageModel):
    """A model behind `/images/generations` and `/images/edits`; may be asked from many threads at once.

    Args:
      endpoint: where it is served, and how it may be called.
      size: (height, width) of pictures whose task names none; the server's own if None.
      references: how a picture is edited. "edits" uploads the references to `/images/edits` (OpenAI and most servers);
        "generations" sends them to `/images/generations` as data URLs in the field `image` (Seedream).
      max_references: more are rejected before anything is sent.
      max_prompt: characters; a longer prompt is rejected before anything is sent.
      response_format: what the server is asked to answer with; not asked if None. Servers that answer with a path on
        their disk (Xinference, SGLang) need "b64_json".
      sends_seed: whether the server takes a `seed`; OpenAI's own do not, and their pictures differ from run to run.
      extra: further fields of the request's body, e.g. {"quality": "high"}.
    Raises: ClvrError if the key or the openai package is missing.
    Source: OpenAI API reference, images; Seedream API reference, image generation.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        size: tuple[int, int] | None = None,
        references: Literal["edits", "generations"] = "edits",
        max_references: int = 16,
        max_prompt: int = 32_000,
        response_format: Literal["b64_json", "url"] | None = None,
        sends_seed: bool = False,
        extra: Mapping[str, Any] | None = None,
    ):
        if references not in ("edits", "generations"):
            raise UsageError(f"references: known ways are edits and generations, got {references!r}")
        self._connection = Connection(endpoint)
        self._size, self._references, self._response_format = size, references, response_format
        self._max_references, self._max_prompt, self._sends_seed = max_references, max_prompt, sends_seed
        self._extra = dict(extra or {})
        self._adaptation = Adaptation(endpoint.name, _OPTIONAL)

    @property
    def name(self) -> str:
        """The model and who serves it."""
        return self._connection.endpoint.name

    @property
    def adapted(self) -> tuple[str, ...]:
        """Says which fields are not sent as they were asked for, since the server refused them."""
        return self._adaptation.notes

    def generate(self, task: ImageRequest) -> ImageResponse:
        """See `ImageModel`. The picture is (height, width, 3) uint8. Raises: ProviderError."""
        self._check(task)
        size = task.size or self._size
        content, usage = self._content(task, size)
        if isinstance(content, str):
            content, usage = self._connection.download(content, usage)
        try:
            return ImageResponse(decode_picture(content, size), usage)
        except Failure as error:
            failure = error
        raise self._connection.error(failure.message, failure.fault, usage)

    def _content(self, task: ImageRequest, size: tuple[int, int] | None) -> tuple[bytes | str, Usage]:
        """Returns the file that the server sends, or its address, and the cost.

        Fields that the server refuses by name are left out from then on.
        """
        wanted: dict[str, Any] = {"model": self._connection.endpoint.model, "prompt": task.prompt, "n": 1}
        if size is not None:
            wanted["size"] = f"{size[1]}x{size[0]}"
        if self._response_format is not None:
            wanted["response_format"] = self._response_format
        if self._sends_seed:
            wanted["seed"] = task.seed
        prices = self._connection.endpoint.prices
        rejected = Usage()
        while True:
            sent = self._adaptation.adapted(wanted)
            try:
                content, usage = self._connection.call(
                    self._sender(task, sent), lambda body: _read_content(body, prices)
                )
            except ProviderError as error:
                if error.fault != "rejected" or not self._adaptation.learn(str(error), sent):
                    raise
                rejected += dataclasses.replace(error.usage, calls=0, retries=error.usage.retries + 1)
                continue
            return content, rejected + usage

    def _sender(self, task: ImageRequest, fields: Mapping[str, Any]) -> Callable[[Any], str]:
        """What sends one request: it may be called several times."""
        request = {**fields}
        extra = {**self._extra, **({"seed": request.pop("seed")} if "seed" in request else {})}
        uploads: list[tuple[str, bytes, str]] = []
        if task.references and self._references == "generations":
            extra["image"] = [picture_url(image) for image in task.references]
        elif task.references:
            uploads = [
                (f"reference_{number}.png", encode_png(image), "image/png")
                for number, image in enumerate(task.references, start=1)
            ]

        def send(client: Any) -> str:
            images = client.images.with_raw_response
            if not uploads:
                return images.generate(**request, extra_body=extra or None).http_response.text
            # A list is sent as image[], which servers with one reference do not know.
            image = uploads if len(uploads) > 1 else uploads[0]
            return images.edit(image=image, **request, extra_body=extra or None).http_response.text

        return send

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def _check(self, task: ImageRequest) -> None:
        if not task.prompt.strip():
            raise self._connection.error("the prompt is empty; say what to draw", "rejected")
        if len(task.prompt) > self._max_prompt:
            raise self._connection.error(
                f"the prompt has {len(task.prompt)} characters, more than max_prompt={self._max_prompt}", "rejected"
            )
        if len(task.references) > self._max_references:
            raise self._connection.error(
                f"{len(task.references)} references, more than max_references={self._max_references}", "rejected"
            )


def read_picture_entry(body: Mapping[str, Any], prices: Prices) -> tuple[dict[str, Any], Usage]:
    """The first entry of an images response, and its price. Raises: Failure "down" if there is none."""
    told = body.get("usage")
    told = told if isinstance(told, dict) else {}
    tokens = count(told.get("input_tokens")), count(told.get("output_tokens"))
    data = body.get("data")
    entry = data[0] if isinstance(data, list) and data else None
    if not isinstance(entry, dict) or not (entry.get("b64_json") or entry.get("url")):
        raise Failure("the answer has no picture", "down", can_retry=True, usage=prices.usage(*tokens))
    return entry, prices.usage(*tokens, pictures=1)


def _read_content(body: Mapping[str, Any], prices: Prices) -> tuple[bytes | str, Usage]:
    """Returns the file of the image in a response, or its address, and the price. Raises: Failure as it may be none."""
    entry, usage = read_picture_entry(body, prices)
    url = "" if entry.get("b64_json") else str(entry["url"])
    if url and not url.startswith("data:"):
        return url, usage
    try:
        return read_data_url(url) if url else decode_base64(str(entry["b64_json"])), usage
    except Failure as failure:
        raise Failure(failure.message, failure.fault, usage=usage) from None


def decode_picture(content: bytes, size: tuple[int, int] | None) -> np.ndarray:
    """The bytes of a picture file as (height, width, 3) uint8.

    size: (height, width) that it must have; any of at most `_MAX_UNASKED_PIXELS` pixels if None.
    Raises: Failure "malformed" if it is no picture or has another size, which is known before it is decoded.
    """
    try:
        with lazy_image(content, "what was sent") as header:
            # Upside down or on its side, as EXIF says: the final size may have height and width exchanged.
            _check_size((header.height, header.width), size, is_upright=False)
        picture = decode_image(content, "what was sent")
    except ClvrError as error:
        raise Failure(f"what was sent is no picture ({len(content)} bytes; {error})", "malformed") from None
    _check_size(picture.shape[:2], size)
    return picture


def _check_size(found: tuple[int, ...], size: tuple[int, int] | None, is_upright: bool = True) -> None:
    height, width = found
    if size is None:
        if height * width > _MAX_UNASKED_PIXELS:
            raise Failure(
                f"got a picture of {height} x {width} (height x width) although no size was asked for; more than "
                f"{_MAX_UNASKED_PIXELS:,} pixels are not taken then, so ask for the size",
                "malformed",
            )
    elif tuple(found) != tuple(size) and (is_upright or sorted(found) != sorted(size)):
        raise Failure(
            f"asked for a picture of {size[0]} x {size[1]} (height x width), got {height} x {width}", "malformed"
        )
