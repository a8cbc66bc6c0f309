"""Decoding of base64 in the forms that servers send."""

import binascii
import io
from urllib.parse import unquote_to_bytes

from clvr_jax.providers.failures import Failure

_STANDARD = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\r\n\f\v"
_PIECE = 1 << 20
_HEAD = 256
"""Most characters before the comma of a data URL: its type and parameters."""


def decode_base64(text: str) -> bytes:
    """Decodes base64 in the standard or URL-safe alphabet, with or without padding, data URL prefix and line breaks.

    Raises: Failure "malformed" for a text that is not base64.
    """
    return _decode(text, text.find(",", 0, _HEAD) + 1 if text.startswith("data:") else 0)


def read_data_url(url: str) -> bytes:
    """Returns the content of a data URL. Raises: Failure "malformed" if it is not valid base64."""
    start = url.find(",", 0, _HEAD) + 1
    if start == 0:
        raise Failure("the image's data URL has no content", "malformed")
    if url.endswith(";base64", 0, start - 1):
        return _decode(url, start)
    return unquote_to_bytes(url[start:])


def _decode(text: str, start: int) -> bytes:
    """Decodes from `start` on, piece by piece: a large text is neither copied nor split."""
    found = io.BytesIO()
    rest = b""
    is_padded = False
    try:
        for begin in range(start, len(text), _PIECE):
            piece = text[begin : begin + _PIECE].encode("ascii").translate(_STANDARD, _SPACE)
            piece, padding, after = piece.partition(b"=")
            if (is_padded and piece) or after.strip(b"="):
                raise binascii.Error("characters after the padding")
            is_padded = is_padded or bool(padding)
            piece = rest + piece
            whole = len(piece) - len(piece) % 4
            found.write(binascii.a2b_base64(piece[:whole], strict_mode=True))
            rest = piece[whole:]
        found.write(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True))
    except ValueError:  # includes UnicodeEncodeError and binascii.Error
        raise Failure("the image is not base64", "malformed") from None
    return found.getvalue()
