"""Checks of the outer JSON object that the wire formats share."""

from collections.abc import Collection, Mapping
from typing import Any

from handler.errors import InvalidInput, InvalidParameter
from handler.parameters import shown


def only(value: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Raises InvalidParameter if the object has a field that is not allowed."""
    if unknown := [name for name in value if name not in allowed]:
        names = ", ".join(shown(name) for name in unknown[:5])
        raise InvalidParameter(f"unknown field {names}; the body takes: {', '.join(sorted(allowed))}")


def parameters(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `parameters` object, {} if absent or null."""
    given = value.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidParameter(f"parameters must be an object, not {type(given).__name__}")
    return given


def items(values: Any, name: str) -> list[Any]:
    """`values` if it is a list. Raises InvalidInput, naming the field, if not."""
    if not isinstance(values, list):
        raise InvalidInput(f"{name} must be a list, not {type(values).__name__}")
    return values
