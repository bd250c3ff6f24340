"""Expressions of telemetry: the part of CEL that filters of access logs and values of metrics' labels are written in. Pure.

Literals, lists, maps, arithmetic, comparisons, logic, `?:`, `in`, `has()`, indexing, conversions and the functions of texts. No macros
that loop, so that an expression's cost is its length. What is not known is refused when it is compiled, attributes by name included.
Why not a library: the pure one drags in a parser generator and date libraries, the native ones a command line or sixteen megabytes.
Source: the CEL language definition; Envoy's attributes.
"""

from __future__ import annotations

import re
from typing import Final

from ztunnel.mesh.l7.evaluation import (
    ATTRIBUTES,
    FUNCTIONS,
    LARGEST,
    METHODS,
    Attributes,
    Evaluate,
    EvaluationError,
    ExpressionError,
    attribute_of,
    call,
    choice,
    constant,
    index_of,
    items,
    mapping,
    negation,
    operation,
    text_of,
)

LONGEST: Final = 4096
MAX_DEPTH: Final = 64
_OWNERS: Final = frozenset(name.partition(".")[0] for name in ATTRIBUTES)

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<float>\d+\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.\d+)
    |(?P<int>0x[0-9a-fA-F]+|\d+)u?
    |(?P<text>r?"(?:[^"\\\n]|\\.)*"|r?'(?:[^'\\\n]|\\.)*')
    |(?P<name>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<sign>&&|\|\||==|!=|<=|>=|[-+*/%<>!?:.,()\[\]{}])
    )""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:([abfnrtv\\'\"`?])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([0-3][0-7]{2})|(.))")
_NAMED = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
_BINARY: Final = {"||": 1, "&&": 2, "==": 3, "!=": 3, "<": 3, "<=": 3, ">": 3, ">=": 3, "in": 3, "+": 4, "-": 4, "*": 5, "/": 5, "%": 5}


class Expression:
    """A compiled expression."""

    __slots__ = ("_evaluate", "text")

    def __init__(self, text: str) -> None:
        """
        Raises:
            ExpressionError: it is too long or deep, not CEL, or needs what is not here.
        """
        self.text = text
        self._evaluate = _Parser(text).whole()

    def evaluate(self, attributes: Attributes) -> object:
        """
        Raises:
            EvaluationError: it has no value for this request.
        """
        return self._evaluate(attributes)

    def holds(self, attributes: Attributes) -> bool:
        """Whether it is true; without a value, or with one that is no boolean, it is not."""
        try:
            return self._evaluate(attributes) is True
        except EvaluationError:
            return False

    def label(self, attributes: Attributes) -> str:
        """Its value as a metric's label; `unknown` without one."""
        try:
            return text_of(self._evaluate(attributes)) or "unknown"
        except EvaluationError:
            return "unknown"


class _Parser:
    """Precedence climbing; builds closures."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ExpressionError(f"an expression of more than {LONGEST} characters")
        self._tokens = _tokens(text)
        self._at = 0
        self._depth = 0

    def whole(self) -> Evaluate:
        found = self._ternary()
        kind, value, position = self._tokens[self._at]
        if kind != "end":
            raise ExpressionError(f"unexpected {value!r} at character {position + 1}")
        return found

    # Tokens

    def _peek(self) -> str:
        """The next sign or word; empty for everything else."""
        kind, value, _ = self._tokens[self._at]
        return value if kind in ("sign", "name") else ""

    def _accept(self, sign: str) -> bool:
        if self._peek() != sign:
            return False
        self._at += 1
        return True

    def _expect(self, sign: str) -> None:
        if not self._accept(sign):
            _, value, position = self._tokens[self._at]
            raise ExpressionError(f"{sign!r} expected at character {position + 1}, not {value!r}")

    # Grammar

    def _ternary(self) -> Evaluate:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpressionError(f"nested more than {MAX_DEPTH} deep")
        condition = self._binary(1)
        if self._accept("?"):
            first = self._ternary()
            self._expect(":")
            condition = choice(condition, first, self._ternary())
        self._depth -= 1
        return condition

    def _binary(self, least: int) -> Evaluate:
        left = self._unary()
        while True:
            sign = self._peek()
            strength = _BINARY.get(sign, 0)
            if strength < least or not strength:
                return left
            self._at += 1
            left = operation(sign, left, self._binary(strength + 1))

    def _unary(self) -> Evaluate:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpressionError(f"nested more than {MAX_DEPTH} deep")
        if self._accept("!"):
            found = negation(self._unary())
        elif self._accept("-"):
            found = operation("-", constant(0), self._unary())
        else:
            found = self._postfix()
        self._depth -= 1
        return found

    def _postfix(self) -> Evaluate:
        found = self._primary()
        while True:
            if self._accept("["):
                found = index_of(found, self._ternary())
                self._expect("]")
            elif self._accept("."):
                name = self._name()
                if self._accept("("):
                    found = call(name, [found, *self._arguments(")")], METHODS, position=self._tokens[self._at - 1][2])
                else:
                    found = index_of(found, constant(name))
            else:
                return found

    def _name(self) -> str:
        kind, value, position = self._tokens[self._at]
        if kind != "name":
            raise ExpressionError(f"a name expected at character {position + 1}, not {value!r}")
        self._at += 1
        return value

    def _arguments(self, closing: str) -> list[Evaluate]:
        found: list[Evaluate] = []
        while not self._accept(closing):
            if found:
                self._expect(",")
                if self._accept(closing):
                    break
            found.append(self._ternary())
        return found

    def _primary(self) -> Evaluate:
        kind, value, position = self._tokens[self._at]
        if kind == "name":
            self._at += 1
            return self._named(value, position)
        if kind in ("int", "float", "text"):
            self._at += 1
            return constant(_literal(kind, value))
        if self._accept("("):
            found = self._ternary()
            self._expect(")")
            return found
        if self._accept("["):
            return items(self._arguments("]"))
        if self._accept("{"):
            return self._map()
        raise ExpressionError(f"a value expected at character {position + 1}, not {value!r}" if value else "it ends too early")

    def _map(self) -> Evaluate:
        pairs: list[tuple[Evaluate, Evaluate]] = []
        while not self._accept("}"):
            if pairs:
                self._expect(",")
                if self._accept("}"):
                    break
            key = self._ternary()
            self._expect(":")
            pairs.append((key, self._ternary()))
        return mapping(pairs)

    def _named(self, name: str, position: int) -> Evaluate:
        if name in _WORDS:
            return constant(_WORDS[name])
        if self._accept("("):
            if name == "has":
                return self._has()
            return call(name, self._arguments(")"), FUNCTIONS, position)
        if name not in _OWNERS:
            raise ExpressionError(f"unknown name {name!r} at character {position + 1}")
        self._expect(".")
        attribute = f"{name}.{self._name()}"
        if attribute not in ATTRIBUTES:
            raise ExpressionError(f"unknown attribute {attribute!r} at character {position + 1}")
        return attribute_of(attribute)

    def _has(self) -> Evaluate:
        found = self._ternary()
        self._expect(")")

        def has(attributes: Attributes) -> object:
            try:
                return found(attributes) is not None
            except EvaluationError:
                return False

        return has


_WORDS: Final[dict[str, object]] = {"true": True, "false": False, "null": None}


def _tokens(text: str) -> list[tuple[str, str, int]]:
    """(kind, text, position) of each; the last is `end`."""
    found: list[tuple[str, str, int]] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise ExpressionError(f"not an expression at character {at + 1}: {text[at : at + 20]!r}")
        found.append((match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
        at = match.end()
    return [*found, ("end", "", end)]


def _literal(kind: str, text: str) -> object:
    if kind == "float":
        return float(text)
    if kind == "int":
        value = int(text, 16) if text[:2] == "0x" else int(text)
        if value > LARGEST:
            raise ExpressionError(f"a number beyond 64 bits: {text[:40]}")
        return value
    if text[0] == "r":
        return text[2:-1]
    return _ESCAPE.sub(_unescaped, text[1:-1])


def _unescaped(match: re.Match[str]) -> str:
    named, two, four, octal, other = match.groups()
    if other:
        raise ExpressionError(f"unknown escape {match[0]!r}")
    if named:
        return _NAMED.get(named, named)
    number = int(two or four, 16) if two or four else int(octal, 8)
    if 0xD800 <= number <= 0xDFFF:
        raise ExpressionError(f"{match[0]!r} is no character")
    return chr(number)
