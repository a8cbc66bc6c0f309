"""Decoding of base64 in the forms that servers send."""

import base64
import contextlib
from urllib.parse import unquote_to_bytes

from clvr_jax.providers.failures import Failure

_STANDARD = bytes.maketrans(b"-_", b"+/")


def decode_base64(text: str) -> bytes:
    """Decodes base64 in the standard or URL-safe alphabet, with or without padding, data URL prefix and line breaks.

    Raises: Failure "malformed" for a text that is not base64.
    """
    with contextlib.suppress(ValueError):  # the usual form, without further copies of a large text
        return base64.b64decode(text, validate=True)
    try:
        # As bytes, because splitting a large text would make millions of strings.
        content = (text.partition(",")[2] if text.startswith("data:") else text).encode("ascii")
        content = content.translate(_STANDARD, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except ValueError:  # includes UnicodeEncodeError and binascii.Error
        raise Failure("the image is not base64", "malformed") from None


def read_data_url(url: str) -> bytes:
    """Returns the content of a data URL. Raises: Failure "malformed" if it is not valid base64."""
    head, _, content = url.partition(",")
    return decode_base64(content) if head.endswith(";base64") else unquote_to_bytes(content)
