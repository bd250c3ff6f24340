"""Expressions: what they say of a request, what they refuse, what happens where a value is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.mesh.l7.evaluation import EvaluationError, ExpressionError
from ztunnel.mesh.l7.expressions import Expression

VALUES: dict[str, object] = {
    "response.code": 404,
    "request.method": "GET",
    "request.url_path": "/api/v1",
    "request.headers": {"x-user": "alice"},
    "request.duration": 1.5,
    "connection.mtls": True,
}


class Known:
    """A request with a few attributes."""

    def value(self, name: str) -> object:
        return VALUES.get(name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("response.code >= 400", True),
        ("response.code >= 400 && response.code < 404", False),
        ("response.code == 404 || false", True),
        ("!(response.code == 404)", False),
        ("request.method == 'GET' ? 'read' : 'write'", "read"),
        ('request.url_path.startsWith("/api")', True),
        ("request.url_path.endsWith('v1') && request.url_path.contains('pi')", True),
        ("request.url_path.matches('^/api/v[0-9]+$')", True),
        ("request.headers['x-user']", "alice"),
        ("'x-user' in request.headers", True),
        ("'x-other' in request.headers", False),
        ("has(request.headers['x-user'])", True),
        ("has(request.headers.other)", False),
        ("has(request.id)", False),
        ("request.method in ['GET', 'HEAD']", True),
        ("{'a': 1}['a'] + 2", 3),
        ("'x' + string(response.code)", "x404"),
        ("size(request.method) * 2 - 1", 5),
        ("7 / 2 + -7 / 2 + 7 % 4 + -7 % 4", 0),
        ("1 + 2 * 3 == 7", True),
        ("(1 + 2) * 3", 9),
        ("2.5 > 2", True),
        ("1 == 1.0", True),
        ("1 == '1'", False),
        ("'a' < 'b'", True),
        ("int('12') + int(1.9)", 13),
        ("double('1.5')", 1.5),
        ("request.duration > duration('1s')", True),
        ("'ABC'.lowerAscii() + 'abc'.upperAscii()", "abcABC"),
        ("r'\\d' + '\\x41\\u0042\\n\\''", "\\dAB\n'"),
        ("0x10 + 1u", 17),
        ("'test'", "test"),
        ("null == null", True),
        ("connection.mtls", True),
    ],
)
def test_values(text: str, value: object) -> None:
    found = Expression(text).evaluate(Known())
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "request.headers['x-other']",
        "request.id",
        "response.code + 'x'",
        "1 / 0",
        "!response.code",
        "response.code && true",
        "[1][1]",
        "int('x')",
        "18446744073709551615 + 1",
        "'a' in 'abc'",
        "1 < 'a'",
        "'x' ? 1 : 2",
        "-'a'",
    ],
)
def test_what_has_no_value(text: str) -> None:
    expression = Expression(text)
    with pytest.raises(EvaluationError):
        expression.evaluate(Known())
    assert not expression.holds(Known())
    assert expression.label(Known()) == "unknown"


def test_logic_does_not_care_about_an_error_if_the_other_side_decides() -> None:
    assert Expression("request.id == 'x' || true").holds(Known())
    assert Expression("true || request.id == 'x'").holds(Known())
    assert Expression("request.id == 'x' && false").evaluate(Known()) is False
    assert not Expression("request.id == 'x' || false").holds(Known())


def test_labels_are_texts() -> None:
    assert [Expression(text).label(Known()) for text in ("true", "5", "1.5", "''", "[1]")] == ["true", "5", "1.5", "unknown", "unknown"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it ends too early"),
        ("1 +", "it ends too early"),
        ("(1", "')' expected"),
        ("1 1", "unexpected '1' at character 3"),
        ("request.pth", "unknown attribute 'request.pth' at character 1"),
        ("reqest.path", "unknown name 'reqest' at character 1"),
        ("request", "'.' expected"),
        ("foo(1)", "unknown function 'foo'"),
        ("'a'.size(1)", "size() with 2 arguments"),
        ("request.headers.exists(x, x == 'a')", "unknown name 'x'"),
        ("'a'.matches('(')", "matches(): not a pattern"),
        ("'a'.matches(request.path)", "matches(): not a pattern"),
        ("'a", "not an expression at character 1"),
        ("1 ; 2", "not an expression at character 2"),
        ("'\\q'", "unknown escape"),
        ("'\\ud800'", "is no character"),
        ("99999999999999999999", "a number beyond 64 bits"),
        ("(" * 100, "nested more than 64 deep"),
        ("!" * 100 + "true", "nested more than 64 deep"),
        ("1" * 5000, "more than 4096 characters"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Expression(text)
    assert message in str(caught.value)


WORDS = [
    "request.path",
    "response.code",
    "'a'",
    "1",
    "(",
    ")",
    "[",
    "]",
    "&&",
    "+",
    "!",
    "-",
    "?",
    ":",
    ".size()",
    "{",
    "}",
    ",",
    "in",
    "has(",
]


@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join) | st.text(max_size=30))
def test_any_text_is_an_expression_or_is_refused(text: str) -> None:
    try:
        expression = Expression(text)
    except ExpressionError:
        return
    assert isinstance(expression.label(Known()), str)
