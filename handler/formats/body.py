"""The body of a request, whatever its content type: a JSON value, a text, or the bytes of an image or sound."""

import codecs
import json
import re
from collections.abc import Mapping
from typing import Any

from handler import media
from handler.errors import RequestError, UnreadableRequest, UnsupportedMediaType
from handler.formats import open_inference

# Encodings that Python has for purposes of its own. Some take quadratic time, none is a charset.
_NOT_CHARSETS = ("idna", "punycode", "raw-unicode-escape", "undefined", "unicode-escape")
# The first characters of a JSON object or list, as opposed to a text that happens to begin with a bracket.
_LOOKS_LIKE_JSON = re.compile(r'\s*(\{\s*["}]|\[\s*["{\[\]])')
_SEND = 'send JSON such as {"inputs": "a text"}, plain text, or an image or sound'


def read(row: Mapping[str, Any], headers: Mapping[str, Any]) -> Any:
    """The JSON value of a request, its text as a str, or an image or sound as bytes.

    TorchServe has decoded some bodies already (exact `application/json`, `text/*`) and hands the others over as a
    bytearray. JSON, images and sounds without a content type, as over gRPC, are recognised. Raises RequestError if
    nothing can be read.
    """
    name = next((field for field in ("body", "data") if field in row), None)
    if name is None and (row or "form" in _header("content-type", headers)):
        # What `curl -d` sends unless told otherwise; TorchServe has taken it apart already.
        raise UnsupportedMediaType(
            "the body came as a web form; send it with the header Content-Type: application/json, or that of the file"
        )
    if name is None:
        raise UnreadableRequest(f"the request has no body; {_SEND}")
    value, media_type = row[name], _media_type(name, headers)
    if not isinstance(value, bytes | bytearray):
        return value
    if not value:
        raise UnreadableRequest(f"the body is empty; {_SEND}")
    if (binary := open_inference.header_length(headers)) is not None:
        return open_inference.read_binary(bytes(value), binary)
    if media_type.partition("/")[0] in ("image", "audio", "video"):
        return bytes(value)
    if media_type.endswith("json"):
        return parse_json(value)
    if not media_type.startswith("text/") and media.media_type(value):
        return bytes(value)
    text = _text(value, "utf-8" if media_type.endswith("octet-stream") else _charset(headers))
    if media_type.startswith("text/"):
        return text
    return _sniffed(text)


def parse_json(value: bytes | bytearray | str) -> Any:
    """JSON of a request. Raises UnreadableRequest, saying where it breaks and never quoting the text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UnreadableRequest(f"the body is not valid JSON: {error.msg} at character {error.pos}") from None
    except (UnicodeDecodeError, RecursionError, ValueError):
        raise UnreadableRequest(
            "the body is not valid JSON: not UTF-8, nested too deeply, or a number too long"
        ) from None


def _sniffed(text: str) -> Any:
    """JSON that came without its content type, or a text."""
    text = text.removeprefix("\ufeff")  # a byte order mark, as Windows tools write it
    if _LOOKS_LIKE_JSON.match(text):
        return parse_json(text)
    if text[:1] == '"':
        try:
            return parse_json(text)
        except RequestError:
            return text
    return text


def _text(value: bytes | bytearray, charset: str) -> str:
    try:
        if codecs.lookup(charset).name in _NOT_CHARSETS:
            raise LookupError
        return value.decode(charset)
    except LookupError:
        raise UnsupportedMediaType("the charset of the content type is not known; send UTF-8") from None
    except UnicodeDecodeError as error:
        raise UnreadableRequest(f"the text is not valid {error.encoding} at byte {error.start}; send UTF-8") from None


def _media_type(field: str, headers: Mapping[str, Any]) -> str:
    """Media type of the body or form part, lower case, without parameters; "" if none was given."""
    part = headers.get(field)
    declared = part.get("content-type", "") if isinstance(part, Mapping) else ""
    return str(declared).partition(";")[0].strip().lower()


def _charset(headers: Mapping[str, Any]) -> str:
    match = re.search(r'charset="?([\w.:-]+)', _header("content-type", headers), re.IGNORECASE)
    return match[1] if match else "utf-8"


def _header(wanted: str, headers: Mapping[str, Any]) -> str:
    """A header of the HTTP request by its lower-case name; clients choose the case. "" if absent."""
    return next((v for name, v in headers.items() if name.lower() == wanted and isinstance(v, str)), "")
