"""Base64 as servers write it."""

import base64
import binascii
import re

from clvr_jax.providers.failures import Failure


def decode_base64(text: str) -> bytes:
    """Decodes base64 in either alphabet, with or without padding, a data URL's head and line breaks.

    Raises: Failure "malformed" if it is none.
    """
    text = text.partition(",")[2] if text.startswith("data:") else text
    text = re.sub(r"\s+", "", text).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise Failure("the image is no base64", "malformed") from None
