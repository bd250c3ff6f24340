"""Typed questions to JSON trees: a Kubernetes object is a tree whose shape nobody has promised.

Every reader answers with the asked type or a default and never raises, so that code which walks users' manifests needs no
ladder of `isinstance`. Where a wrong type must be refused, `validate` in `admission` says so with the field's name.
"""

from __future__ import annotations

Tree = dict[str, object]


def at(body: object, *path: str) -> object:
    """The value at `path`, or None where any step is missing or is not a mapping."""
    for step in path:
        if not isinstance(body, dict):
            return None
        body = body.get(step)
    return body


def branch(body: object, *path: str) -> Tree:
    """The mapping at `path`; an empty one that is not part of the tree where there is none."""
    found = at(body, *path)
    return found if isinstance(found, dict) else {}


def branches(body: object, *path: str) -> list[Tree]:
    """The mappings in the list at `path`."""
    found = at(body, *path)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def text(body: object, *path: str, default: str = "") -> str:
    """The string at `path`."""
    found = at(body, *path)
    return found if isinstance(found, str) else default


def texts(body: object, *path: str) -> list[str]:
    """The strings in the list at `path`; numbers are written as YAML readers expect of `args`."""
    found = at(body, *path)
    return [str(item) for item in found if isinstance(item, (str, int, float))] if isinstance(found, list) else []


def integer(body: object, *path: str, default: int = 0) -> int:
    """The whole number at `path`; booleans are not numbers."""
    found = at(body, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else default


def flag(body: object, *path: str) -> bool:
    """Whether the value at `path` is true."""
    return at(body, *path) is True


def strings(body: object, *path: str) -> dict[str, str]:
    """The string-valued entries of the mapping at `path`: labels, annotations, selectors."""
    return {key: value for key, value in branch(body, *path).items() if isinstance(value, str)}


def put(body: Tree, value: object, *path: str) -> None:
    """Set `path` to `value`, making the mappings on the way."""
    for step in path[:-1]:
        inner = body.get(step)
        if not isinstance(inner, dict):
            inner = {}
            body[step] = inner
        body = inner
    body[path[-1]] = value


def drop(body: Tree, *path: str) -> None:
    """Remove what is at `path`, if anything is."""
    branch(body, *path[:-1]).pop(path[-1], None)


def merge(last: object, new: object, live: object) -> object:
    """Kubernetes' three-way merge: `live` with what changed from `last` to `new`; lists are replaced whole.

    What `last` had and `new` has not is removed; what neither names (labels set by hand, defaults, status) stays.
    """
    if not isinstance(new, dict) or not isinstance(live, dict):
        return new
    before = last if isinstance(last, dict) else {}
    kept = {key: value for key, value in live.items() if key in new or key not in before}
    return kept | {key: merge(before.get(key), value, kept.get(key)) for key, value in new.items()}
