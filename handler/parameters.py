"""Checks request parameters against a dataclass: its fields are the allowed names, its hints the allowed types."""

import math
import types
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from handler.errors import InvalidParameter

Overflow = Literal["error", "truncate", "window"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonParameters:
    """Parameters that every text task takes.

    overflow: what happens to a text longer than the model's maximum; None means the archive's own policy.
    details: answer with usage and model facts beside the predictions.
    """

    overflow: Overflow | None = None
    details: bool = False


P = TypeVar("P")


def between(minimum: float, maximum: float) -> Any:
    """A dataclass field that is None by default and, when given, from `minimum` to `maximum`."""
    return field(default=None, metadata={"minimum": minimum, "maximum": maximum})


def at_least(minimum: float) -> Any:
    """A dataclass field that is None by default and, when given, at least `minimum`."""
    return field(default=None, metadata={"minimum": minimum})


def parse(kind: type[P], given: Mapping[str, Any], beside: Iterable[str] = ()) -> P:
    """Builds `kind` (a dataclass) from a client's parameters. beside: names that were taken out of them before.

    Raises InvalidParameter for an unknown name (naming the allowed ones), a value of another type, or one below
    the field's `minimum` or above its `maximum`.
    """
    if not given:
        return kind()
    allowed = _allowed(cast(Hashable, kind))
    for name, value in given.items():
        if name not in allowed:
            names = ", ".join(sorted([*allowed, *beside]))
            raise InvalidParameter(f"unknown parameter {shown(name)}; this task takes: {names}")
        hint, minimum, maximum = allowed[name]
        if not _fits(value, hint):
            raise InvalidParameter(f"parameter {name!r} must be {_described(hint)}, not {shown(value)}")
        if minimum is not None and value is not None and value < minimum:
            raise InvalidParameter(f"parameter {name!r} must be at least {minimum}, not {shown(value)}")
        if maximum is not None and value is not None and value > maximum:
            raise InvalidParameter(f"parameter {name!r} must be at most {maximum}, not {shown(value)}")
    return kind(**given)


@cache
def _allowed(kind: Hashable) -> dict[str, tuple[Any, float | None, float | None]]:
    assert isinstance(kind, type)
    hints = get_type_hints(kind)
    return {f.name: (hints[f.name], f.metadata.get("minimum"), f.metadata.get("maximum")) for f in fields(kind)}


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union or a Literal, flattened: values for a Literal, types otherwise."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(option for member in get_args(hint) for option in _options(member))
    return get_args(hint) if get_origin(hint) is Literal else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    for option in _options(hint):
        if get_origin(option) is list:
            if isinstance(value, list) and all(_fits(entry, *get_args(option)) for entry in value):
                return True
        elif not isinstance(option, type):
            if type(value) is type(option) and value == option:
                return True
        elif option is float:
            # JSON has one kind of number; a bool is not one, though Python counts it as an int. NaN is none either.
            if isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf:
                return True
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return True
    return False


def described(kind: type[Any]) -> list[tuple[str, str]]:
    """The names of a dataclass's parameters, each with the values that it takes, in words."""
    found = []
    for name, (hint, minimum, maximum) in _allowed(cast(Hashable, kind)).items():
        least = "" if minimum is None else f", at least {minimum}"
        most = "" if maximum is None else f", at most {maximum}"
        found.append((name, _described(hint) + least + most))
    return found


def _described(hint: Any) -> str:
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "null",
        list[str]: "a list of strings",
        dict: "an object",
    }
    return " or ".join(names.get(option) or repr(option) for option in _options(hint))


def shown(value: Any) -> str:
    """A client's value made safe for a message: ASCII, one line, at most 40 characters."""
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists within lists within lists
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
