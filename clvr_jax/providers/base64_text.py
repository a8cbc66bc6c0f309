"""Base64 as servers write it."""

import base64
import contextlib
from urllib.parse import unquote_to_bytes

from clvr_jax.providers.failures import Failure

_STANDARD = bytes.maketrans(b"-_", b"+/")


def decode_base64(text: str) -> bytes:
    """Decodes base64 in either alphabet, with or without padding, a data URL's head and line breaks.

    Raises: Failure "malformed" if it is none.
    """
    with contextlib.suppress(ValueError):  # as most servers write it: no further copies of a large text
        return base64.b64decode(text, validate=True)
    try:
        # Bytes, because a large text would be split into millions of pieces.
        content = (text.partition(",")[2] if text.startswith("data:") else text).encode("ascii")
        content = content.translate(_STANDARD, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
    except ValueError:  # UnicodeEncodeError and binascii.Error are such
        raise Failure("the image is no base64", "malformed") from None


def read_data_url(url: str) -> bytes:
    """Returns what a data URL holds. Raises: Failure "malformed" if its base64 is none."""
    head, _, content = url.partition(",")
    return decode_base64(content) if head.endswith(";base64") else unquote_to_bytes(content)
