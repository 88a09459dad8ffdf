"""Images and sounds as clients send them: told by their first bytes, and read out of JSON."""

import base64
import binascii
import re
from typing import Any

from handler.errors import InvalidInput, UnreadableRequest

# Signatures that are letters alone are taken only with bytes behind them that no text has.
_SIGNATURES = {
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8[79]a(?=.{0,6}\x00)",
    "image/webp": rb"RIFF.{4}WEBPVP8[ LX]",
    "image/bmp": rb"BM.{4}\x00{4}",
    "image/tiff": rb"II\*\x00|MM\x00\*",
    "audio/wav": rb"RIFF.{4}WAVE",
    "audio/flac": rb"fLaC[\x00\x80]",
    "audio/ogg": rb"OggS\x00",
}
_ANY = re.compile(
    b"|".join(b"(?P<%s>%s)" % (name.replace("/", "_").encode(), form) for name, form in _SIGNATURES.items()), re.DOTALL
)
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]{1,20}://", re.IGNORECASE)


def media_type(content: bytes | bytearray) -> str | None:
    """The media type of an image or sound by its first bytes, None for anything else."""
    match = _ANY.match(content)
    return match.lastgroup.replace("_", "/") if match and match.lastgroup else None


def read_bytes(value: Any, what: str) -> bytes:
    """The bytes of one input. `what`: what it should be, e.g. "image", for messages.

    value: the bytes themselves; base64, also as a data: URI; or `{"b64": base64}`, as KServe writes bytes in JSON.
    Raises InvalidInput for a URL, which is never fetched, and for other types; UnreadableRequest for a string that is
    not base64, and for no bytes at all.
    """
    if isinstance(value, dict) and set(value) == {"b64"}:
        value = value["b64"]
    if isinstance(value, str):
        value = _from_base64(value, what)
    if not isinstance(value, bytes | bytearray):
        raise InvalidInput(f"an input must be the bytes of the {what} or a base64 string, not {type(value).__name__}")
    if not value:
        raise UnreadableRequest(f"the {what} has no bytes")
    return bytes(value)


def _from_base64(text: str, what: str) -> bytes:
    if _URL.match(text):
        raise InvalidInput(f"addresses are not fetched: send the bytes of the {what} itself, or base64")
    prefix = _DATA_URI.match(text)
    encoded = text[prefix.end() if prefix else 0 :]
    try:
        # Some encoders break lines; nothing else may stand between the letters, or a short text would pass for base64.
        return base64.b64decode(encoded.replace("\r", "").replace("\n", ""), validate=True)
    except (binascii.Error, ValueError):
        raise UnreadableRequest(f"the {what} is a string that is not base64; send its bytes, or base64") from None
