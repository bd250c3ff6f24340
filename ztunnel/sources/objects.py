"""From documents to the set of objects in force, with a refusal for everything that is not. Pure.

The rules, in one place: a document that is refused leaves the last good object of its key in force; without one, a policy is
replaced by what denies everything it could have selected, and anything else is absent. An object that two documents define is
refused in the same way, because which of them wins would depend on file names.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import trio

from ztunnel.mesh.derive import MeshState
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.authentication import PeerAuthenticationObject
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import Ignored, KubeObject, RefusedPolicy, key, key_of, parse, unpack
from ztunnel.mesh.manifests.selectors import TargetRef
from ztunnel.mesh.refused import StandIn, is_stand_in, stand_in
from ztunnel.runtime.documents import DocumentError


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """Something in a source that is not in force as written."""

    file: str
    object: str
    """`Kind namespace/name`, or empty when the whole file is meant."""
    field: str
    """Path of the field within the object, or empty."""
    reason: str
    unknown: bool = False
    """Nobody can tell which object it is."""


Sink = Callable[[MeshState, tuple[Refusal, ...]], Awaitable[None]]
"""Who is told what the mesh is, and what of it is refused."""


class Source(Protocol):
    """Where the mesh comes from."""

    @property
    def objects(self) -> Mapping[ObjectKey, KubeObject]:
        """What there is, as of the sink's last call."""
        ...

    async def run(self, sink: Sink, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell the sink what there is, say "started", then tell every change of it, for ever."""
        ...


@dataclass(frozen=True, slots=True)
class Judged:
    """One object of one file: in force as `item`, or refused, with what stands in its place if it is a policy."""

    key: ObjectKey
    file: str
    item: KubeObject | None = None
    stand_in: StandIn | None = None


@dataclass(frozen=True, slots=True)
class Combined:
    """What all files add up to."""

    objects: dict[ObjectKey, KubeObject]
    refusals: tuple[Refusal, ...]


def judge(body: object, file: str, number: int) -> Iterator[tuple[Judged | None, Refusal | None]]:
    """The objects of one document, one by one, and what is wrong with each (see `judge_one`).

    Args:
        file: its name as shown to the operator.
        number: of the document in the file, from 1.
    Raises:
        DocumentError: a List that cannot be unpacked: nobody can say which objects are in it.
    """
    place = f"{file} document {number}"
    try:
        bodies = unpack(body)
    except ManifestError as error:
        raise DocumentError(f"document {number}: {error.field}: {error.reason}") from error
    for index, each in enumerate(bodies, 1):
        yield judge_one(each, file, place if len(bodies) == 1 else f"{place} item {index}")


def judge_one(body: object, file: str, where: str) -> tuple[Judged | None, Refusal | None]:
    """One object and what is wrong with it. None of both: a kind that the mesh has no use for.

    Args:
        where: it stands; for errors of an object without a name.
    """
    try:
        item = parse(body, where)
    except ManifestError as error:
        object_key = key_of(body)
        refusal = Refusal(file, error.subject, error.field, error.reason, unknown=object_key is None)
        return None if object_key is None else Judged(object_key, file, stand_in=stand_in(body, error)), refusal
    return None if isinstance(item, Ignored) else Judged(key(item), file, item), None


def combine(documents: Iterable[Judged], in_force: Mapping[ObjectKey, KubeObject]) -> Combined:
    """The objects that are to be in force now.

    Args:
        documents: of all files.
        in_force: the objects of the last round; where the last good versions are.
    """
    by_key: dict[ObjectKey, list[Judged]] = {}
    for document in documents:
        by_key.setdefault(document.key, []).append(document)
    objects: dict[ObjectKey, KubeObject] = {}
    refusals: list[Refusal] = []
    for object_key, candidates in by_key.items():
        chosen = candidates[0].item
        # Refused documents without a name share a key; the stand-in of one stands for them all.
        if len(candidates) > 1 and object_key.name:
            refusal = _duplicate(object_key, candidates)
            refusals.append(refusal)
            chosen = last_good(object_key, in_force) or _stand_in_of_duplicates(object_key, candidates, refusal)
        elif chosen is None:
            stand_ins = (candidate.stand_in for candidate in candidates if candidate.stand_in is not None)
            chosen = last_good(object_key, in_force) or next(stand_ins, None)
        if chosen is not None:
            objects[object_key] = chosen
    return Combined(objects, tuple(refusals))


def changed(
    former: Mapping[ObjectKey, KubeObject], present: Mapping[ObjectKey, KubeObject]
) -> Iterator[tuple[ObjectKey, KubeObject | None]]:
    """The objects that came or changed, and the keys of those that went, with None."""
    for object_key, item in present.items():
        old = former.get(object_key)
        if old is not item and old != item:
            yield object_key, item
    for object_key in former.keys() - present.keys():
        yield object_key, None


def unreadable(file: str, reason: str) -> Judged:
    """What stands for a file of which nothing is known: nobody can say which policies it holds, so everything is denied."""
    object_key = ObjectKey("AuthorizationPolicy", "", f"unreadable file {file}")
    return Judged(object_key, file, stand_in=RefusedPolicy(object_key, None, everywhere=True, reason=reason))


def last_good(object_key: ObjectKey, in_force: Mapping[ObjectKey, KubeObject]) -> KubeObject | None:
    """The version that stays in force when a later one is refused."""
    item = in_force.get(object_key)
    return None if is_stand_in(item) else item


def _duplicate(object_key: ObjectKey, candidates: list[Judged]) -> Refusal:
    files = list(dict.fromkeys(candidate.file for candidate in candidates))
    if len(files) == 1:
        return Refusal(files[0], str(object_key), "", f"defined {len(candidates)} times in {files[0]}")
    return Refusal(files[-1], str(object_key), "", f"defined in {', '.join(files[:8])}; keep one of them")


def _stand_in_of_duplicates(object_key: ObjectKey, candidates: list[Judged], refusal: Refusal) -> KubeObject | None:
    """What is in force of an object that was never defined only once: for a policy its denial, else the first in file order."""
    items = [candidate.item or candidate.stand_in for candidate in candidates]
    selectors: list[dict[str, str] | None] = []
    targets: list[TargetRef] = []
    for item in items:
        if not isinstance(item, AuthorizationPolicyObject | PeerAuthenticationObject | RefusedPolicy):
            return item
        if not isinstance(item, PeerAuthenticationObject) and item.targets:
            targets.extend(item.targets)
        else:
            selectors.append(item.selector)
    if not selectors:
        return RefusedPolicy(object_key, None, everywhere=False, reason=refusal.reason, targets=tuple(dict.fromkeys(targets)))
    # Different selectors: all that either could have meant, which is the namespace.
    selector = selectors[0] if all(other == selectors[0] for other in selectors) else None
    return RefusedPolicy(object_key, selector, everywhere=False, reason=refusal.reason)
