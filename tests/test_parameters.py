"""Request parameters: only known names and right types pass, and what a client sent is shown safely."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from handler.errors import InvalidParameter
from handler.parameters import CommonParameters, at_least, parse
from handler.tasks.text_classification import TextClassificationParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(CommonParameters):
    """One field of every kind."""

    count: int | None = at_least(1)
    ratio: float | None = at_least(0)
    mode: Literal["fast", "exact"] | None = None
    level: Literal[0, 1] | None = None
    name: str = ""
    number: float = 1.0


def refusal(given: dict[str, Any], kind: type[CommonParameters] = Sample) -> str:
    """The message of the InvalidParameter that `given` must raise: one line of ASCII that is not too long."""
    with pytest.raises(InvalidParameter) as caught:
        parse(kind, given)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 200
    assert caught.value.body() == {"error": message, "code": 422, "type": "InvalidParameter"}
    return message


def nested(depth: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def test_nothing_given_is_the_defaults() -> None:
    assert parse(Sample, {}) == Sample(overflow=None, details=False, count=None, ratio=None, mode=None)


@pytest.mark.parametrize(
    "given",
    [
        {"count": 1},
        {"count": 10**30},
        {"ratio": 0},
        {"ratio": 0.5},
        {"ratio": 10**400},
        {"number": -3},
        {"mode": "exact"},
        {"overflow": "window", "details": True},
        {"name": "é\x00"},
    ],
    ids=lambda given: json.dumps(given)[:40],
)
def test_right_values_arrive_as_they_are(given: dict[str, Any]) -> None:
    parsed = parse(Sample, given)
    assert {name: getattr(parsed, name) for name in given} == given


@pytest.mark.parametrize("name", ["count", "ratio", "mode", "overflow"])
def test_null_is_the_default(name: str) -> None:
    assert getattr(parse(Sample, {name: None}), name) is None


def test_an_unknown_name_lists_the_allowed_ones() -> None:
    assert refusal({"top_p": 1}) == (
        "unknown parameter 'top_p'; this task takes: count, details, level, mode, name, number, overflow, ratio"
    )
    assert refusal({"top_n": 1}, TextClassificationParameters) == (
        "unknown parameter 'top_n'; this task takes: "
        "details, function_to_apply, overflow, temperature, threshold, top_k"
    )


def test_one_wrong_parameter_beside_right_ones() -> None:
    assert refusal({"count": 2, "detail": True}).startswith("unknown parameter 'detail'")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": True}, "parameter 'count' must be an integer or null, not True"),
        ({"count": 1.0}, "parameter 'count' must be an integer or null, not 1.0"),
        ({"count": "1"}, "parameter 'count' must be an integer or null, not '1'"),
        ({"count": float("nan")}, "parameter 'count' must be an integer or null, not nan"),
        ({"count": [1]}, "parameter 'count' must be an integer or null, not [1]"),
        ({"count": {"a": [1]}}, "parameter 'count' must be an integer or null, not {'a': [1]}"),
        ({"ratio": False}, "parameter 'ratio' must be a number or null, not False"),
        ({"ratio": "0.5"}, "parameter 'ratio' must be a number or null, not '0.5'"),
        ({"ratio": float("nan")}, "parameter 'ratio' must be a number or null, not nan"),
        ({"ratio": float("inf")}, "parameter 'ratio' must be a number or null, not inf"),
        ({"ratio": float("-inf")}, "parameter 'ratio' must be a number or null, not -inf"),
        ({"number": None}, "parameter 'number' must be a number, not None"),
        ({"name": None}, "parameter 'name' must be a string, not None"),
        ({"name": 3}, "parameter 'name' must be a string, not 3"),
        ({"details": 1}, "parameter 'details' must be true or false, not 1"),
        ({"details": None}, "parameter 'details' must be true or false, not None"),
        ({"details": "true"}, "parameter 'details' must be true or false, not 'true'"),
        ({"mode": "slow"}, "parameter 'mode' must be 'fast' or 'exact' or null, not 'slow'"),
        ({"mode": ["fast"]}, "parameter 'mode' must be 'fast' or 'exact' or null, not ['fast']"),
        ({"level": True}, "parameter 'level' must be 0 or 1 or null, not True"),
        ({"level": 1.0}, "parameter 'level' must be 0 or 1 or null, not 1.0"),
        ({"overflow": False}, "parameter 'overflow' must be 'error' or 'truncate' or 'window' or null, not False"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_value_of_another_type_is_refused(given: dict[str, Any], message: str) -> None:
    assert refusal(given) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 0}, "parameter 'count' must be at least 1, not 0"),
        ({"count": -(10**30)}, "parameter 'count' must be at least 1, not -1000000000000000000000000000000"),
        ({"ratio": -0.001}, "parameter 'ratio' must be at least 0, not -0.001"),
    ],
    ids=["zero", "very negative", "float"],
)
def test_a_value_below_the_minimum_is_refused(given: dict[str, Any], message: str) -> None:
    assert refusal(given) == message


HOSTILE = {
    "control characters": "a\r\nSet-Cookie: b\x00\x1b[31m\x85\u2028",
    "long": "x" * 1_000_000,
    "long and not ascii": "é" * 1_000_000,
    "lone surrogate": "\ud800",
    "emoji": "\U0001f600",
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_names_and_values_are_shown_safely(value: str) -> None:
    assert "unknown parameter '" in refusal({value: 1})
    for given in (value, [value], {value: value}):
        assert "must be an integer or null" in refusal({"count": given})


def test_a_long_value_is_cut_to_forty_characters() -> None:
    assert refusal({"count": "x" * 100}).endswith(f"not '{'x' * 36}...")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(nested(100_000), "list"), ({"a": nested(100_000)}, "dict"), ("9" * 5000, "'9999")],
    ids=["list", "object", "digits"],
)
def test_values_that_python_cannot_print(value: Any, shown: str) -> None:
    assert shown in refusal({"count": value})


def test_an_integer_too_long_to_print() -> None:
    assert refusal({"count": -(10**5000)}) == "parameter 'count' must be at least 1, not a value of type int"
    assert refusal({"details": 10**5000}) == "parameter 'details' must be true or false, not a value of type int"
