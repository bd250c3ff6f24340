"""VirtualServices that delegate: a root's rule is replaced by the rules of another VirtualService, both sides' matches holding at once.

Source: Istio `pilot/pkg/model/virtualservice.go` (merging of delegates).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ztunnel.mesh.l7.routes import NO_EDITS, HeaderEdits, NamedMatch, PathKind, PathMatch, RequestMatch
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.virtual_hosts import is_visible
from ztunnel.mesh.manifests.virtual_service import HttpMatch, HttpRule, VirtualServiceObject, Where

MAX_RULES = 10_000
"""Of one VirtualService with its delegates'; beyond, rules are dropped with a note."""


def expanded(item: VirtualServiceObject, objects: Mapping[ObjectKey, KubeObject]) -> tuple[tuple[HttpRule, ...], tuple[str, ...]]:
    """The rules of a root with its delegates' in their places, and what went wrong."""
    rules: list[HttpRule] = []
    notes: list[str] = []
    for index, rule in enumerate(item.http):
        if rule.delegate is None:
            rules.append(rule)
            continue
        namespace, name = rule.delegate
        namespace = namespace or item.metadata.namespace
        found = objects.get(ObjectKey("VirtualService", namespace, name))
        place = f"spec.http[{index}].delegate"
        if not isinstance(found, VirtualServiceObject) or found.hosts:
            notes.append(f"{place}: there is no VirtualService {namespace}/{name} without hosts")
        elif not is_visible(found.export_to, namespace, item.metadata.namespace):
            notes.append(f"{place}: VirtualService {namespace}/{name} is not visible in {item.metadata.namespace}")
        else:
            for number, leaf in enumerate(found.http):
                merged = _merged(rule, leaf)
                if merged is None:
                    notes.append(
                        f"{place}: the matches of rule {number} of {namespace}/{name} contradict those of the root, it is left out"
                    )
                elif len(rules) < MAX_RULES:
                    rules.append(merged)
                else:
                    notes.append(f"{place}: more than {MAX_RULES} rules")
                    break
    return tuple(rules), tuple(notes)


def _merged(root: HttpRule, leaf: HttpRule) -> HttpRule | None:
    """The leaf, narrowed by the root's matches and completed by its settings; None where the two exclude each other."""
    matches: list[HttpMatch] = []
    for outer in root.matches or (HttpMatch(RequestMatch()),):
        for inner in leaf.matches or (HttpMatch(RequestMatch()),):
            both = _both(outer, inner)
            if both is None:
                return None
            matches.append(both)
    return replace(
        leaf,
        name="-".join(each for each in (root.name, leaf.name) if each),
        matches=tuple(matches) if root.matches or leaf.matches else (),
        rewrite=leaf.rewrite or (None if leaf.redirect or leaf.direct else root.rewrite),
        timeout=root.timeout if leaf.timeout is None else leaf.timeout,
        retry=leaf.retry if leaf.retry_said else root.retry,
        fault=leaf.fault or root.fault,
        mirrors=leaf.mirrors or root.mirrors,
        cors=leaf.cors or root.cors,
        request=_joined(root.request, leaf.request),
        response=_joined(root.response, leaf.response),
        authority=leaf.authority or root.authority,
    )


def _both(outer: HttpMatch, inner: HttpMatch) -> HttpMatch | None:
    one, other = outer.request, inner.request
    where = _both_places(outer.where, inner.where)
    headers, query = _both_named(one.headers, other.headers), _both_named(one.query, other.query)
    if where is None or headers is None or query is None or not _narrows(one.path, other.path):
        return None
    if one.method is not None and other.method is not None and one.method != other.method:
        return None
    name = "-".join(each for each in (one.name, other.name) if each)
    return HttpMatch(RequestMatch(other.path or one.path, other.method or one.method, headers, query, name=name), where)


def _both_places(outer: Where, inner: Where) -> Where | None:
    if outer.port and inner.port and outer.port != inner.port:
        return None
    if outer.source_namespace and inner.source_namespace and outer.source_namespace != inner.source_namespace:
        return None
    labels = dict(outer.source_labels)
    if any(labels.setdefault(key, value) != value for key, value in inner.source_labels):
        return None
    # A delegate's gateways mean nothing: it is where its root is.
    return Where(
        outer.port or inner.port,
        outer.gateways,
        tuple(sorted(labels.items())),
        outer.source_namespace or inner.source_namespace,
    )


def _both_named(outer: tuple[NamedMatch, ...], inner: tuple[NamedMatch, ...]) -> tuple[NamedMatch, ...] | None:
    found = {(each.name, each.claim, each.inverted): each for each in outer}
    for each in inner:
        if found.setdefault((each.name, each.claim, each.inverted), each) != each:
            return None
    return tuple(found.values())


def _narrows(outer: PathMatch | None, inner: PathMatch | None) -> bool:
    """Whether what the inner one matches is certain to be matched by the outer one, so that the inner one may stand for both."""
    if outer is None or inner is None or outer == inner:
        return True
    return outer.kind is PathKind.PREFIX and inner.kind is not PathKind.REGEX and inner.value.startswith(outer.value)


def _joined(root: HeaderEdits, leaf: HeaderEdits) -> HeaderEdits:
    if root == NO_EDITS or leaf == NO_EDITS:
        return leaf if root == NO_EDITS else root
    return HeaderEdits(
        tuple((dict(root.set) | dict(leaf.set)).items()),
        tuple((dict(root.add) | dict(leaf.add)).items()),
        tuple(dict.fromkeys((*root.remove, *leaf.remove))),
    )
