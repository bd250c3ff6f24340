"""Rows to text: table, wide table, JSON, names. Pure; YAML alone is loaded when it is asked for.

Tables are as kubectl's: upper-case headers, columns padded with spaces, `<none>` for what is empty. A cell never holds a control
character, whatever a daemon says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, object]

FORMATS = ("table", "wide", "json", "yaml", "name")
VOLATILE = frozenset(("age_seconds", "seconds_left", "bytes_sent", "bytes_received"))
"""Values that change by themselves; a watch does not show a row again for them alone."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    header: str
    cell: Callable[[Row], str]
    wide: bool = False
    """Only with `-o wide`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of row: what it is called, how it is shown and what it is sorted and filtered by."""

    name: str
    plural: str
    columns: tuple[Column, ...]
    key: Callable[[Row], tuple[str, ...]]
    """Identifies a row on its node; also its name and its place in the order."""
    namespace: Callable[[Row], str]
    mesh_wide: bool = False
    """Every agent lists the same rows."""


def text(name: str) -> Callable[[Row], str]:
    """A cell that shows one value as it is; lists with commas, booleans as yes and no."""
    return lambda row: shown(row.get(name))


def shown(value: object) -> str:
    """One value for a person."""
    match value:
        case bool():
            return "yes" if value else "no"
        case None | "" | []:
            return "<none>"
        case list():
            return ",".join(shown(each) for each in value)
        case _:
            plain = str(value)
            return plain if plain.isprintable() else json.dumps(plain)[1:-1]


def number(row: Row, name: str) -> float:
    """A numeric value, 0 where there is none."""
    value = row.get(name)
    return value if isinstance(value, (int, float)) else 0.0


def rows_of(value: object) -> list[Row]:
    """The objects in a JSON list; none for anything else, so that a daemon's mistake is an empty listing."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def items(answer: Row) -> list[Row]:
    """The rows of an answer."""
    return rows_of(answer.get("items"))


def duration(seconds: float) -> str:
    """As kubectl shows ages: the two largest units at most."""
    whole = int(seconds)
    if whole < 0:
        return f"-{duration(-seconds)}"
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days >= 8 or (days and not hours):
        return f"{days}d"
    if days:
        return f"{days}d{hours}h"
    if hours >= 8 or (hours and not minutes):
        return f"{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    if minutes >= 8 or (minutes and not rest):
        return f"{minutes}m"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def size(count: float) -> str:
    """Bytes with a binary unit and three digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 99.5 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}TiB"


def age(name: str = "age_seconds") -> Callable[[Row], str]:
    """A cell that shows a duration."""
    return lambda row: duration(number(row, name))


def volume(name: str) -> Callable[[Row], str]:
    """A cell that shows bytes."""
    return lambda row: size(number(row, name))


def ordered(kind: Kind, rows: Iterable[Row]) -> list[Row]:
    """Sorted by key, then by agent: the same rows give the same listing."""
    return sorted(rows, key=lambda row: (kind.key(row), shown(row.get("agents"))))


def merged(kind: Kind, by_agent: Sequence[tuple[str, Sequence[Row]]]) -> list[Row]:
    """Rows of several agents with an `agents` value; rows on which agents agree are shown once if the kind is mesh-wide."""
    if not kind.mesh_wide:
        return ordered(kind, ({**row, "agents": [agent]} for agent, rows in by_agent for row in rows))
    agents: dict[str, list[str]] = {}
    first: dict[str, Row] = {}
    for agent, rows in by_agent:
        for row in rows:
            identical = json.dumps(row, sort_keys=True)
            first.setdefault(identical, row)
            agents.setdefault(identical, []).append(agent)
    return ordered(kind, ({**row, "agents": sorted(agents[identical])} for identical, row in first.items()))


def columns_of(kind: Kind, *, wide: bool, agents: bool) -> list[Column]:
    """The columns to show; with several agents, the first says which."""
    chosen = [column for column in kind.columns if wide or not column.wide]
    if not agents or (kind.mesh_wide and not wide):
        return chosen
    return [Column("AGENTS" if kind.mesh_wide else "NODE", text("agents")), *chosen]


def table(rows: Sequence[Row], columns: Sequence[Column], *, headers: bool = True) -> list[str]:
    """Lines of a table. Without trailing spaces, so that a diff of two listings shows what differs."""
    lines = [[column.header for column in columns]] if headers else []
    lines += [[column.cell(row) for column in columns] for row in rows]
    widths = [max((len(line[index]) for line in lines), default=0) for index in range(len(columns))]
    return ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def names(kind: Kind, rows: Sequence[Row]) -> list[str]:
    """`kind/namespace/name`, one a line."""
    return [f"{kind.name}/{'/'.join(shown(part) for part in kind.key(row))}" for row in rows]


def as_json(value: object) -> str:
    """Indented, in the daemon's order of keys."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def as_yaml(value: object) -> str:
    """The same as YAML, without a final newline."""
    from yaml import safe_dump  # heavy, and only this needs it

    return safe_dump(value, sort_keys=False, allow_unicode=True).rstrip("\n")


def changed(before: Iterable[Row], after: Iterable[Row]) -> list[Row]:
    """The rows of `after` that are new or differ in more than what changes by itself."""
    known = {_lasting(row) for row in before}
    return [row for row in after if _lasting(row) not in known]


def _lasting(row: Row) -> str:
    return json.dumps({name: value for name, value in row.items() if name not in VOLATILE}, sort_keys=True)
