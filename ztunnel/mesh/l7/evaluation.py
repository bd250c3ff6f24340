"""What the operators and functions of `expressions` do: closures over closures, each one a step of an expression. Pure.

`&&` and `||` do not care about an error on one side if the other decides. Numbers are of 64 bits; durations are seconds.
Source: the CEL language definition.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from ztunnel.mesh.l7.patterns import BadPattern, compile_pattern

SMALLEST, LARGEST = -(2**63), 2**64 - 1


class ExpressionError(ValueError):
    """An expression that cannot be used; the text says what and where."""


class EvaluationError(Exception):
    """An expression has no value for this request: something is missing or of another type."""


class Attributes(Protocol):
    """What is known of one request."""

    def value(self, name: str) -> object:
        """An attribute, by its name with dots (`request.headers`): None if this request has none.

        Text, int, float, bool, a list, or a mapping of texts.
        """
        ...


ATTRIBUTES: Final = frozenset(
    f"{owner}.{name}"
    for owner, names in {
        "request": (
            *("path", "url_path", "host", "scheme", "method", "headers", "referer", "useragent", "time", "id", "protocol", "query"),
            *("duration", "size", "total_size"),
        ),
        "response": ("code", "code_details", "flags", "grpc_status", "headers", "trailers", "size", "total_size"),
        "source": ("address", "port", "principal", "namespace", "workload"),
        "destination": ("address", "port", "principal", "namespace", "workload"),
        "connection": ("id", "mtls", "requested_server_name", "uri_san_peer_certificate", "termination_details"),
        "upstream": ("address", "port", "transport_failure_reason", "request_attempt_count"),
        "xds": ("cluster_name", "route_name"),
        "downstream_peer": ("name", "namespace", "workload", "app", "version", "service", "revision", "cluster", "principal"),
        "upstream_peer": ("name", "namespace", "workload", "app", "version", "service", "revision", "cluster", "principal"),
    }.items()
    for name in names
)

Evaluate = Callable[[Attributes], object]


def constant(value: object) -> Evaluate:
    """Always this."""
    return lambda _: value


def attribute_of(name: str) -> Evaluate:
    """An attribute of the request; no value without it."""

    def attribute(attributes: Attributes) -> object:
        value = attributes.value(name)
        if value is None:
            raise EvaluationError(f"no {name}")
        return value

    return attribute


def items(listed: list[Evaluate]) -> Evaluate:
    """A list."""
    return lambda attributes: [item(attributes) for item in listed]


def mapping(pairs: list[tuple[Evaluate, Evaluate]]) -> Evaluate:
    """A map."""

    def build(attributes: Attributes) -> object:
        found = {}
        for key, value in pairs:
            name = key(attributes)
            if not isinstance(name, str | int):
                raise EvaluationError("a key that is neither text nor a number")
            found[name] = value(attributes)
        return found

    return build


def choice(condition: Evaluate, first: Evaluate, second: Evaluate) -> Evaluate:
    """`condition ? first : second`."""
    return lambda attributes: first(attributes) if _boolean(condition(attributes)) else second(attributes)


def negation(operand: Evaluate) -> Evaluate:
    """`!operand`."""
    return lambda attributes: not _boolean(operand(attributes))


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise EvaluationError("not a boolean")
    return value


def index_of(whole: Evaluate, key: Evaluate) -> Evaluate:
    """`whole[key]`, or a member."""

    def index(attributes: Attributes) -> object:
        value, name = whole(attributes), key(attributes)
        if isinstance(value, Mapping):
            found = value.get(name)
            if found is None:
                raise EvaluationError(f"no such key: {name}")
            return found
        if isinstance(value, list) and isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(value):
            return value[name]
        raise EvaluationError("no such index")

    return index


def operation(sign: str, left: Evaluate, right: Evaluate) -> Evaluate:
    """`left sign right`."""
    if sign in ("&&", "||"):
        return _logic(left, right, decisive=sign == "||")
    operate = _OPERATIONS[sign]

    def apply(attributes: Attributes) -> object:
        return operate(left(attributes), right(attributes))

    return apply


def _logic(left: Evaluate, right: Evaluate, *, decisive: bool) -> Evaluate:
    def logic(attributes: Attributes) -> object:
        try:
            if _boolean(left(attributes)) is decisive:
                return decisive
        except EvaluationError:
            if _boolean(right(attributes)) is decisive:
                return decisive
            raise
        return _boolean(right(attributes))

    return logic


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(left: object, right: object) -> object:
    if _is_number(left) and _is_number(right):
        return left == right
    return type(left) is type(right) and left == right


def _compared(test: Callable[[float, float], bool], texts: Callable[[str, str], bool]) -> Callable[[object, object], object]:
    def compare(left: object, right: object) -> object:
        if isinstance(left, str) and isinstance(right, str):
            return texts(left, right)
        return test(_number(left), _number(right))

    return compare


def _number(value: object) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise EvaluationError("not a number")


def _arithmetic(compute: Callable[[float, float], float]) -> Callable[[object, object], object]:
    def arithmetic(left: object, right: object) -> object:
        try:
            value = compute(_number(left), _number(right))
        except (ZeroDivisionError, OverflowError) as error:
            raise EvaluationError(str(error)) from error
        if isinstance(value, int) and not SMALLEST <= value <= LARGEST:
            raise EvaluationError("a number beyond 64 bits")
        return value

    return arithmetic


def _plus(left: object, right: object) -> object:
    if isinstance(left, str) and isinstance(right, str):
        return left + right
    if isinstance(left, list) and isinstance(right, list):
        return left + right
    return _arithmetic(lambda first, second: first + second)(left, right)


def _divided(left: float, right: float) -> float:
    if isinstance(left, int) and isinstance(right, int):
        whole = abs(left) // abs(right)
        return whole if (left < 0) == (right < 0) else -whole
    return left / right


def _remainder(left: float, right: float) -> float:
    if not (isinstance(left, int) and isinstance(right, int)):
        raise EvaluationError("% needs whole numbers")
    rest = abs(left) % abs(right)
    return -rest if left < 0 else rest


def _contained(item: object, whole: object) -> object:
    if isinstance(whole, Mapping):
        return isinstance(item, str | int) and whole.get(item) is not None
    if isinstance(whole, list):
        return any(_equal(item, each) for each in whole)
    raise EvaluationError("`in` needs a list or a map")


_OPERATIONS: Final[dict[str, Callable[[object, object], object]]] = {
    "==": _equal,
    "!=": lambda left, right: not _equal(left, right),
    "<": _compared(lambda left, right: left < right, lambda left, right: left < right),
    "<=": _compared(lambda left, right: left <= right, lambda left, right: left <= right),
    ">": _compared(lambda left, right: left > right, lambda left, right: left > right),
    ">=": _compared(lambda left, right: left >= right, lambda left, right: left >= right),
    "in": _contained,
    "+": _plus,
    "-": _arithmetic(lambda left, right: left - right),
    "*": _arithmetic(lambda left, right: left * right),
    "/": _arithmetic(_divided),
    "%": _arithmetic(_remainder),
}


# Functions.


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise EvaluationError("not a text")
    return value


def text_of(value: object) -> str:
    """A value as text, as CEL's `string()`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        return f"{value:g}"
    raise EvaluationError("no text of this")


def _int(value: object) -> object:
    try:
        number = int(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError) as error:
        raise EvaluationError("not a number") from error
    if number is None or not SMALLEST <= number <= LARGEST:
        raise EvaluationError("not a number")
    return number


def _double(value: object) -> object:
    try:
        return float(value) if isinstance(value, str | int | float) else _number(value)
    except ValueError as error:
        raise EvaluationError("not a number") from error


def _size(value: object) -> object:
    if isinstance(value, str | list | dict):
        return len(value)
    raise EvaluationError("no size of this")


_SPAN = re.compile(r"(-?\d{1,12}(?:\.\d{1,9})?)(h|m|s|ms)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def _duration(value: object) -> object:
    match = _SPAN.fullmatch(_text(value))
    if match is None:
        raise EvaluationError("not a duration")
    return float(match[1]) * _SECONDS[match[2]]


FUNCTIONS: Final[dict[str, tuple[int, Callable[..., object]]]] = {
    "size": (1, _size),
    "string": (1, text_of),
    "int": (1, _int),
    "uint": (1, _int),
    "double": (1, _double),
    "duration": (1, _duration),
}
"""Number of arguments, and what it does. Durations are seconds."""
METHODS: Final[dict[str, tuple[int, Callable[..., object]]]] = {
    "contains": (2, lambda text, part: _text(part) in _text(text)),
    "startsWith": (2, lambda text, part: _text(text).startswith(_text(part))),
    "endsWith": (2, lambda text, part: _text(text).endswith(_text(part))),
    "lowerAscii": (1, lambda text: _text(text).lower()),
    "upperAscii": (1, lambda text: _text(text).upper()),
    "trim": (1, lambda text: _text(text).strip()),
    "size": (1, _size),
}


def call(name: str, arguments: list[Evaluate], known: dict[str, tuple[int, Callable[..., object]]], position: int) -> Evaluate:
    """A function of some arguments.

    Raises:
        ExpressionError: there is none of that name, or not with so many arguments.
    """
    if name == "matches" and len(arguments) == 2:
        return _matches(arguments[0], arguments[1])
    if name not in known:
        raise ExpressionError(f"unknown function {name!r} at character {position + 1}")
    count, function = known[name]
    if len(arguments) != count:
        raise ExpressionError(f"{name}() with {len(arguments)} arguments at character {position + 1}")
    return lambda attributes: function(*[argument(attributes) for argument in arguments])


def _matches(text: Evaluate, pattern: Evaluate) -> Evaluate:
    """Its pattern must be a literal: compiling one for each request would cost more than the request."""
    try:
        compiled = compile_pattern(_text(pattern(_NOTHING)))
    except (BadPattern, EvaluationError) as error:
        raise ExpressionError(f"matches(): not a pattern: {error}") from error
    return lambda attributes: compiled.search(_text(text(attributes)).encode()) is not None


class _Nothing:
    def value(self, name: str) -> object:
        return None


_NOTHING: Final = _Nothing()
