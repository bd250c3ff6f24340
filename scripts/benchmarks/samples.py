"""What a profiler saw, made into shares: lines of `perf script` in, counts by kind of code and by symbol out. PURE."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

FIELDS = "pid,ip,sym,dso"
"""What `perf script -F` must be asked for."""
TOP = 15

_LINE = re.compile(r"\s*(?P<pid>\d+)\s+(?P<ip>[0-9a-f]+)\s+(?P<symbol>.+?) \((?P<image>(?:[^()]|\(deleted\))*)\)\s*")
_KERNEL_HALF = 1 << 63
_INTERPRETER = re.compile(r"python[0-9.]*|libpython[^/]*")
_CRYPTO = re.compile(r"_rust\.abi3\.so|lib(crypto|ssl)[^/]*")
_COMPILED = re.compile(r".*/ztunnel/.*\.cpython-[^/]*\.so|.*__mypyc\.cpython-[^/]*\.so")
"""mypyc's one library of them all lies beside the package."""


class Kind(Enum):
    """Whose code it is that ran."""

    KERNEL = "kernel"
    CRYPTO = "crypto"
    INTERPRETER = "interpreter"
    COMPILED = "our compiled modules"
    REST = "libc and rest"


class UnreadableError(ValueError):
    """It is not what `perf script` prints."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One tick of the profiler's clock."""

    pid: int
    kind: Kind
    symbol: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function that took time. `by_role`: its part of each role's samples, 0 to 1; `share`: of all samples."""

    name: str
    kind: Kind
    share: float
    by_role: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Shares:
    """Where a role's time went: 0 to 1 for each kind; nothing where no sample fell."""

    samples: int
    of: Mapping[Kind, float]


def parse(text: str) -> list[Sample]:
    """The samples that `perf script -F pid,ip,sym,dso` lists.

    Raises:
        UnreadableError: a line is something else.
    """
    found = []
    for line in filter(str.strip, text.splitlines()):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UnreadableError(f"no sample: {line[:200]!r}")
        kind = kind_of(int(match["ip"], 16), match["image"])
        found.append(Sample(int(match["pid"]), kind, _name(match["symbol"], match["image"])))
    return found


def kind_of(address: int, image: str) -> Kind:
    """Whose code is at an address in an image (a path, or a word in brackets)."""
    # By address, since the kernel has an image for each module.
    if address & _KERNEL_HALF:
        return Kind.KERNEL
    path = image.removesuffix(" (deleted)")
    name = path.rpartition("/")[2]
    if _CRYPTO.fullmatch(name):
        return Kind.CRYPTO
    if _INTERPRETER.fullmatch(name):
        return Kind.INTERPRETER
    if _COMPILED.fullmatch(path) and "/site-packages/" not in path:
        return Kind.COMPILED
    return Kind.REST


def _name(symbol: str, image: str) -> str:
    """A function without a name is called for where it is."""
    return symbol if symbol != "[unknown]" else f"? in {image.rpartition('/')[2]}"


def shares(samples: Iterable[Sample], pids: Iterable[int]) -> Shares:
    """Of the samples in these processes."""
    wanted = set(pids)
    counted = Counter(sample.kind for sample in samples if sample.pid in wanted)
    total = counted.total()
    return Shares(total, {kind: counted[kind] / total for kind in Kind} if total else {})


def top(samples: Sequence[Sample], roles: Mapping[str, Iterable[int]], most: int = TOP) -> list[Symbol]:
    """The functions that took most of all roles' time together, longest first."""
    role_of = {pid: role for role, pids in roles.items() for pid in pids}
    counts: dict[tuple[Kind, str], Counter[str]] = {}
    totals: Counter[str] = Counter()
    for sample in samples:
        role = role_of.get(sample.pid)
        if role is not None:
            totals[role] += 1
            counts.setdefault((sample.kind, sample.symbol), Counter())[role] += 1
    longest = sorted(counts.items(), key=lambda item: -item[1].total())[:most]
    return [
        Symbol(name, kind, by.total() / totals.total(), {role: by[role] / totals[role] if totals[role] else 0.0 for role in roles})
        for (kind, name), by in longest
    ]
