"""Image models behind an OpenAI-compatible images endpoint: GPT-Image, DALL-E, Seedream and compatible servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.image_io import decode_image, encode_png, lazy_image
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.interfaces import ImageModel, ImageRequest, ImageResponse, ProviderError, Usage
from clvr_jax.providers.adaptation import Adaptation, OptionalFields
from clvr_jax.providers.base64_text import decode_base64, read_data_url
from clvr_jax.providers.bounded import count
from clvr_jax.providers.endpoint import Connection, Endpoint, Prices
from clvr_jax.providers.failures import Failure
from clvr_jax.providers.openai_chat import image_data_url

if TYPE_CHECKING:
    import openai

_MAX_DEFAULT_PIXELS = 2**24
"""Maximum pixels of an image whose size was not requested: 4096 x 4096."""
_LEAST_LIMIT, _GREATEST_LIMIT = 4 << 20, 64 << 20
"""Limits of an encoded image in bytes. A response may have 64 MiB: 4096 x 4096 pixels, not compressed, in base64."""
_BASE64_SPARE = 1 << 16
"""Bytes of a response beside its image."""
_OPTIONAL = (
    OptionalFields(("response_format",)),
    OptionalFields(("seed",), consequence="images may differ from run to run"),
)


class OpenAIImageModel(ImageModel):
    """A model behind `/images/generations` and `/images/edits`; may be called from many threads at once.

    Args:
      endpoint: address and limits.
      size: (height, width) of images whose request has no size; the server's own if None.
      references: how references are sent. "edits" uploads them to `/images/edits` (OpenAI and most servers);
        "generations" sends them to `/images/generations` as data URLs in the field `image` (Seedream).
      max_references: maximum number of references; more are rejected before anything is sent.
      max_prompt: maximum number of characters; a longer prompt is rejected before anything is sent.
      response_format: requested form of the response; not sent if None. Servers that would return a path on their disk
        (Xinference, SGLang) need "b64_json".
      sends_seed: whether the server accepts a `seed`; OpenAI's own do not, and their images differ from run to run.
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
        extra: Mapping[str, JSON] | None = None,
    ):
        if references not in ("edits", "generations"):
            raise UsageError(f"references must be edits or generations, got {references!r}")
        self._connection = Connection(endpoint)
        self._size, self._references, self._response_format = size, references, response_format
        self._max_references, self._max_prompt, self._sends_seed = max_references, max_prompt, sends_seed
        self._extra = dict(extra or {})
        self._adaptation = Adaptation(endpoint.name, _OPTIONAL)

    @property
    def name(self) -> str:
        """Model and host."""
        return self._connection.endpoint.name

    @property
    def adapted(self) -> tuple[str, ...]:
        """Descriptions of the fields that were omitted because the server rejects them."""
        return self._adaptation.notes

    def generate(self, request: ImageRequest) -> ImageResponse:
        """Returns one image, (height, width, 3) uint8. Raises: ProviderError."""
        self._check(request)
        size = request.size or self._size
        image, usage = self._image_or_url(request, size)
        if isinstance(image, str):
            downloaded, usage = self._connection.download(
                image, lambda content: decode_response_image(content, size), max_encoded_bytes(size), usage
            )
            return ImageResponse(downloaded, usage)
        return ImageResponse(image, usage)

    def _image_or_url(self, request: ImageRequest, size: tuple[int, int] | None) -> tuple[np.ndarray | str, Usage]:
        """Returns the image of the response, or its URL, and the usage.

        Fields that the server rejects by name are omitted from then on.
        """
        fields: dict[str, JSON] = {"model": self._connection.endpoint.model, "prompt": request.prompt, "n": 1}
        if size is not None:
            fields["size"] = f"{size[1]}x{size[0]}"
        if self._response_format is not None:
            fields["response_format"] = self._response_format
        if self._sends_seed:
            fields["seed"] = request.seed
        prices = self._connection.endpoint.prices
        rejected = Usage()
        while True:
            sent = self._adaptation.adapted(fields)
            try:
                found, usage = self._connection.call(
                    self._sender(request, sent),
                    lambda body: _read_image(body, prices, size),
                    max_bytes=_BASE64_SPARE + 4 * max_encoded_bytes(size) // 3,
                )
            except ProviderError as error:
                if error.fault != "rejected" or not self._adaptation.learn(str(error), sent):
                    raise
                rejected += dataclasses.replace(error.usage, calls=0, retries=error.usage.retries + 1)
                continue
            return found, rejected + usage

    def _sender(self, request: ImageRequest, fields: Mapping[str, JSON]) -> Callable[[openai.OpenAI], str]:
        """Returns a function that sends the request with a client, and may be called several times."""
        sent: dict[str, Any] = {**fields}
        extra = {**self._extra, **({"seed": sent.pop("seed")} if "seed" in sent else {})}
        uploads: list[tuple[str, bytes, str]] = []
        if request.references and self._references == "generations":
            extra["image"] = [image_data_url(image) for image in request.references]
        elif request.references:
            uploads = [
                (f"reference_{number}.png", encode_png(image), "image/png")
                for number, image in enumerate(request.references, start=1)
            ]

        def send(client: openai.OpenAI) -> str:
            images = client.images.with_raw_response
            if not uploads:
                return images.generate(**sent, extra_body=extra or None).http_response.text
            # A list is sent as image[], which servers that take one reference do not support.
            image = uploads if len(uploads) > 1 else uploads[0]
            return images.edit(image=image, **sent, extra_body=extra or None).http_response.text

        return send

    def close(self) -> None:
        """Closes the connections to the server."""
        self._connection.close()

    def _check(self, request: ImageRequest) -> None:
        if not request.prompt.strip():
            raise self._connection.error("the prompt is empty; describe the image", "rejected")
        if len(request.prompt) > self._max_prompt:
            raise self._connection.error(
                f"the prompt has {len(request.prompt)} characters, more than max_prompt={self._max_prompt}", "rejected"
            )
        if len(request.references) > self._max_references:
            raise self._connection.error(
                f"{len(request.references)} references, more than max_references={self._max_references}", "rejected"
            )


def read_image_entry(body: UncheckedJSON, prices: Prices) -> tuple[dict[str, Any], Usage]:
    """Returns the first entry of an images response, and its usage. Raises: Failure "down" if there is none."""
    reported = body.get("usage")
    reported = reported if isinstance(reported, dict) else {}
    tokens = count(reported.get("input_tokens")), count(reported.get("output_tokens"))
    data = body.get("data")
    entry = data[0] if isinstance(data, list) and data else None
    if not isinstance(entry, dict) or not (entry.get("b64_json") or entry.get("url")):
        raise Failure("the answer has no image", "down", can_retry=True, usage=prices.usage(*tokens))
    return entry, prices.usage(*tokens, images=1)


def _read_image(body: UncheckedJSON, prices: Prices, size: tuple[int, int] | None) -> tuple[np.ndarray | str, Usage]:
    """Returns the image in a response, or its URL, and the usage.

    The image is decoded here, while the bytes of the response count as held; encoded images of many calls fill the
    memory.
    Raises: Failure "down" if there is none, "malformed" as `decode_response_image`.
    """
    entry, usage = read_image_entry(body, prices)
    url = "" if entry.get("b64_json") else str(entry["url"])
    if url and not url.startswith("data:"):
        return url, usage
    try:
        content = read_data_url(url) if url else decode_base64(str(entry["b64_json"]))
        url = ""
        entry.clear()  # the text is no longer needed and may be as large as the image
        return decode_response_image(content, size), usage
    except Failure as failure:
        raise Failure(failure.message, failure.fault, usage=usage) from None


def max_encoded_bytes(size: tuple[int, int] | None) -> int:
    """Returns the maximum size of an encoded image: that of 16-bit RGBA without compression, and at least 4 MiB.

    Args:
      size: (height, width); None for the largest image that is accepted if no size is requested.
    """
    pixels = _MAX_DEFAULT_PIXELS if size is None else size[0] * size[1]
    return min(max(8 * pixels, _LEAST_LIMIT), _GREATEST_LIMIT)


def decode_response_image(content: bytes, size: tuple[int, int] | None) -> np.ndarray:
    """Decodes the image of a response to (height, width, 3) uint8.

    Args:
      content: the encoded image.
      size: requested (height, width); if None, any size of at most `_MAX_DEFAULT_PIXELS` pixels.
    Raises: Failure "malformed" if it is not an image or has another size, which is checked before it is decoded.
    """
    try:
        with lazy_image(content, "the response") as header:
            # Height and width may be exchanged by the EXIF orientation.
            _check_size((header.height, header.width), size, is_upright=False)
        image = decode_image(content, "the response")
    except ClvrError as error:
        raise Failure(f"the response is not an image ({len(content)} bytes; {error})", "malformed") from None
    _check_size(image.shape[:2], size)
    return image


def _check_size(found: tuple[int, ...], size: tuple[int, int] | None, is_upright: bool = True) -> None:
    height, width = found
    if size is None:
        if height * width > _MAX_DEFAULT_PIXELS:
            raise Failure(
                f"got an image of {height} x {width} (height x width) although no size was requested; request a size "
                f"to get more than {_MAX_DEFAULT_PIXELS:,} pixels",
                "malformed",
            )
    elif tuple(found) != tuple(size) and (is_upright or sorted(found) != sorted(size)):
        raise Failure(
            f"requested an image of {size[0]} x {size[1]} (height x width), got {height} x {width}", "malformed"
        )
