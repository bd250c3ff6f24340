"""What of a proxy's configuration has changed, so that workers are told that and not all of it. Pure.

`applied(before, difference(before, after))` is `after`, but for the order of services and workloads, which means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from waypoint.data.channel import ChangeConfig
from ztunnel.mesh.l7.config import ProxyConfig, ServedService, ServedWorkload

_Value = TypeVar("_Value")


def service_key(service: ServedService) -> str:
    """What tells services apart."""
    return f"{service.namespace}/{service.hostname}"


def difference(before: ProxyConfig, after: ProxyConfig) -> ChangeConfig:
    """What makes `after` of `before`. Servers and options are told anew each time: they are small."""
    gone: dict[str, tuple[str, ...]] = {}
    services = _changed(_services(before.services), _services(after.services), "services", gone)
    workloads = _changed(_workloads(before.workloads), _workloads(after.workloads), "workloads", gone)
    rest = replace(
        after,
        services=tuple(services.values()),
        workloads=tuple(workloads.values()),
        clusters=_changed(before.clusters, after.clusters, "clusters", gone),
        policies=_changed(before.policies, after.policies, "policies", gone),
        authentications=_changed(before.authentications, after.authentications, "authentications", gone),
        telemetry=_changed(before.telemetry, after.telemetry, "telemetry", gone),
        providers=_changed(before.providers, after.providers, "providers", gone),
        peers=_changed(before.peers, after.peers, "peers", gone),
    )
    return ChangeConfig(rest, gone)


def applied(before: ProxyConfig, change: ChangeConfig) -> ProxyConfig:
    """The configuration behind a change."""
    news, gone = change.config, change.gone
    return replace(
        news,
        services=tuple(_merged(_services(before.services), _services(news.services), gone.get("services", ())).values()),
        workloads=tuple(_merged(_workloads(before.workloads), _workloads(news.workloads), gone.get("workloads", ())).values()),
        clusters=_merged(before.clusters, news.clusters, gone.get("clusters", ())),
        policies=_merged(before.policies, news.policies, gone.get("policies", ())),
        authentications=_merged(before.authentications, news.authentications, gone.get("authentications", ())),
        telemetry=_merged(before.telemetry, news.telemetry, gone.get("telemetry", ())),
        providers=_merged(before.providers, news.providers, gone.get("providers", ())),
        peers=_merged(before.peers, news.peers, gone.get("peers", ())),
    )


def _services(services: Iterable[ServedService]) -> dict[str, ServedService]:
    return {service_key(each): each for each in services}


def _workloads(workloads: Iterable[ServedWorkload]) -> dict[str, ServedWorkload]:
    return {each.uid: each for each in workloads}


def _changed(before: Mapping[str, _Value], after: Mapping[str, _Value], part: str, gone: dict[str, tuple[str, ...]]) -> dict[str, _Value]:
    missing = tuple(key for key in before if key not in after)
    if missing:
        gone[part] = missing
    return {key: value for key, value in after.items() if key not in before or before[key] != value}


def _merged(before: Mapping[str, _Value], news: Mapping[str, _Value], gone: tuple[str, ...]) -> dict[str, _Value]:
    merged = dict(before)
    for key in gone:
        merged.pop(key, None)
    merged.update(news)
    return merged
