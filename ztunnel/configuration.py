"""From a mapping and an environment to a dataclass of settings: types, ranges, and all problems at once. Pure.

A program's settings are a frozen dataclass of leaves and sections; `settings` is the agent's. Each leaf's type, default and metadata
(`between`, `matching`, `max_bytes`) are all that the reader needs to know.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar, get_args, get_type_hints

from ztunnel.mesh.errors import ConfigError

_Leaf = Field[object]
_Section = TypeVar("_Section")
_Settings = TypeVar("_Settings")
_TEXTS = tuple[str, ...]
_MOST_TEXTS = 1000


def between(lowest: float, highest: float) -> dict[str, object]:
    """Metadata of a number: its range, both ends included."""
    return {"lowest": lowest, "highest": highest}


def matching(expression: str, meaning: str) -> dict[str, object]:
    """Metadata of a text: what it must match as a whole, and what to call that."""
    return {"pattern": re.compile(expression), "meaning": meaning}


@dataclass(frozen=True, slots=True)
class Reader(Generic[_Settings]):
    """Reads one program's settings.

    Args:
        kind: their class.
        prefix: of its environment variables.
        contradictions: a sentence for each thing that settings of the right types say and that cannot be.
    """

    kind: type[_Settings]
    prefix: str
    contradictions: Callable[[_Settings], Iterator[str]]

    def parse(self, config: Mapping[str, object], environ: Mapping[str, str]) -> _Settings:
        """The settings that a configuration mapping and an environment ask for.

        Args:
            config: nested, as YAML or JSON gives it.
            environ: variables named by the prefix and the key in capitals with `_` for `.` win over `config`. An unknown variable that
                resembles a setting is refused as a typing error; any other is somebody else's (Kubernetes puts
                `ZTUNNEL_SERVICE_HOST` and the like into every pod when a service has our name).
        Raises:
            ConfigError: `problems` has every unknown key, wrong type, value out of range and missing value.
        """
        problems: list[str] = []
        given = dict(_flatten(self.kind, config, "", problems))
        leaves = dict(leaves_of(self.kind, ""))
        blamed = self._apply_environment(given, leaves, environ, problems)
        problems.extend(f"{key}: no such setting{_resembling(key, leaves)}" for key in sorted(given.keys() - leaves.keys()))
        values: dict[str, object] = {}
        for key, (leaf, kind) in leaves.items():
            if key in given:
                values[key] = _check(blamed.get(key, key), given[key], leaf, kind, problems)
            elif leaf.default is MISSING:
                problems.append(f"{key}: required")
        if problems:
            raise ConfigError(problems)
        settings = _build(self.kind, "", values)
        problems.extend(self.contradictions(settings))
        if problems:
            raise ConfigError(problems)
        return settings

    def variable(self, key: str) -> str:
        """The environment variable that overrides a setting."""
        return self.prefix + key.upper().replace(".", "_")

    def _apply_environment(
        self, given: dict[str, object], leaves: Mapping[str, tuple[_Leaf, object]], environ: Mapping[str, str], problems: list[str]
    ) -> dict[str, str]:
        """Put the variables' values over the file's; setting → variable, for those that one gave."""
        blamed: dict[str, str] = {}
        known = {self.variable(key): key for key in leaves}
        for name, text in sorted(environ.items()):
            if not name.startswith(self.prefix):
                continue
            if name in known:
                key = known[name]
                given[key] = _from_text(text, leaves[key][1])
                blamed[key] = name
                continue
            short = {candidate.removeprefix(self.prefix): candidate for candidate in known}
            close = difflib.get_close_matches(name.removeprefix(self.prefix), short, n=1, cutoff=0.85)
            if close:
                problems.append(f"{name}: no such variable; did you mean {short[close[0]]}?")
        return blamed


def _flatten(kind: type, config: Mapping[str, object], prefix: str, problems: list[str]) -> Iterator[tuple[str, object]]:
    sections = {name for name, each in get_type_hints(kind).items() if is_dataclass(each)}
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if not prefix and key in sections:
            if isinstance(value, Mapping):
                yield from _flatten(kind, value, f"{key}.", problems)
            elif value is not None:
                problems.append(f"{dotted}: a mapping is expected, found {_kind_of(value)}")
        else:
            yield dotted, value


def leaves_of(section: type, prefix: str) -> Iterator[tuple[str, tuple[_Leaf, object]]]:
    """Dotted key of each setting of a class, with its field and type."""
    hints = get_type_hints(section)
    for leaf in fields(section):
        kind = hints[leaf.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from leaves_of(kind, f"{prefix}{leaf.name}.")
        else:
            yield prefix + leaf.name, (leaf, kind)


def _from_text(text: str, kind: object) -> object:
    """What YAML would have given for the same characters (texts of a list: between commas); text that does not fit is left for `_check`
    to refuse."""
    if kind == _TEXTS:
        return [part.strip() for part in text.split(",") if part.strip()]
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        if kind is int:
            return int(text)
        if kind is float:
            return float(text)
    except ValueError:
        return text
    return text


def _check(key: str, value: object, leaf: _Leaf, kind: object, problems: list[str]) -> object:
    """The value in its own type, or a problem noted and None."""
    options = get_args(kind)
    if type(None) in options:
        if value is None:
            return None
        kind = options[0]
    problem = ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        choices = {str(member.value): member for member in kind}
        if isinstance(value, str) and value in choices:
            return choices[value]
        problem = f"one of {', '.join(choices)} is expected, found {_kind_of(value)}"
    elif kind is Path:
        problem = _path_problem(value, leaf)
        if not problem:
            return Path(str(value))
    elif kind is bool:
        problem = "" if isinstance(value, bool) else f"true or false is expected, found {_kind_of(value)}"
    elif kind == _TEXTS:
        if isinstance(value, list) and len(value) <= _MOST_TEXTS:
            found = [problem for problem in (_text_problem(each, leaf) for each in value) if problem]
            problems.extend(f"{key}: {problem}" for problem in found)
            return tuple(value)
        problem = f"a list of at most {_MOST_TEXTS} texts is expected, found {_kind_of(value)}"
    elif kind is str:
        problem = _text_problem(value, leaf)
    else:
        problem = _number_problem(value, leaf, whole=kind is int)
        if not problem and kind is float and isinstance(value, int):
            return float(value)
    if problem:
        problems.append(f"{key}: {problem}")
        return None
    return value


def _path_problem(value: object, leaf: _Leaf) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        return f"a path is expected, found {_kind_of(value)}"
    longest = leaf.metadata.get("max_bytes")
    if isinstance(longest, int) and len(value.encode()) > longest:
        return f"longer than {longest} bytes"
    return ""


def _text_problem(value: object, leaf: _Leaf) -> str:
    if not isinstance(value, str):
        return f"text is expected, found {_kind_of(value)}"
    pattern = leaf.metadata.get("pattern")
    if isinstance(pattern, re.Pattern) and pattern.fullmatch(value) is None:
        return f"{leaf.metadata['meaning']} is expected, found {value[:100]!r}"
    return ""


def _number_problem(value: object, leaf: _Leaf, *, whole: bool) -> str:
    noun = "a whole number" if whole else "a number"
    # bool is an int in Python, and `drain_seconds: yes` is not one second.
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return f"{noun} is expected, found {_kind_of(value)}"
    lowest, highest = leaf.metadata["lowest"], leaf.metadata["highest"]
    if not math.isfinite(value) or not lowest <= value <= highest:
        return f"between {lowest:g} and {highest:g} is expected, found {value:g}"
    return ""


def _build(section: type[_Section], prefix: str, values: Mapping[str, object]) -> _Section:
    hints = get_type_hints(section)
    chosen: dict[str, object] = {}
    assert is_dataclass(section)
    for leaf in fields(section):
        kind = hints[leaf.name]
        key = prefix + leaf.name
        if isinstance(kind, type) and is_dataclass(kind):
            chosen[leaf.name] = _build(kind, f"{key}.", values)
        elif key in values:
            chosen[leaf.name] = values[key]
    return section(**chosen)


def _resembling(key: str, leaves: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, leaves, n=1)
    if not close:
        # `metrics_port` at the top level: the right word in the wrong section.
        last = key.rpartition(".")[2]
        close = [known for known in leaves if known.rpartition(".")[2] == last][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _kind_of(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool() | int() | float():
            return str(value).lower()
        case str():
            return repr(value[:100])
        case Mapping():
            return "a mapping"
        case _:
            return "a list" if isinstance(value, list) else type(value).__name__
