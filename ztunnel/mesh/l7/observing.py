"""Which Telemetry holds for a service: all that apply, from the mesh's to the service's own, added up. Pure.

Order: the root namespace, the proxy's namespace, the service's namespace, then targetRefs (the proxy's, the service's); what comes later
wins. Also what MeshConfig's providers are as upstreams.
Source: Istio `pilot/pkg/model/telemetry.go`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from ztunnel.mesh.l7.attach import Placed, ProxyTarget, ServiceTarget, applies_to_proxy, applies_to_service
from ztunnel.mesh.l7.security import AuthorizerKind, ExtensionProvider
from ztunnel.mesh.l7.telemetry import AccessLog, Collector, TelemetrySettings, Tracing
from ztunnel.mesh.manifests.mesh_config import MeshConfig, Provider, ProviderKind
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.telemetry import TelemetryObject

BUILT_IN_LOG = "envoy"
"""The provider that is MeshConfig's own access log."""


class FindCluster(Protocol):
    """The key of the cluster of a host's port, empty without one; `namespace` may be empty."""

    def __call__(self, hostname: str, namespace: str, port: int, *, grpc: bool = False) -> str: ...


class Observing:
    """The Telemetry of one proxy, and what of it holds for what it serves."""

    def __init__(
        self, objects: Iterable[KubeObject], mesh: MeshConfig, proxy: ProxyTarget, root_namespace: str, find_cluster: FindCluster
    ) -> None:
        self._mesh = mesh
        self._proxy = proxy
        self._root_namespace = root_namespace
        self._find_cluster = find_cluster
        listed = [item for item in objects if isinstance(item, TelemetryObject) and not item.selects]
        # Of several for one place the oldest wins, as for Istio's other policies, so it comes last.
        listed.sort(key=lambda item: (item.metadata.created, item.metadata.namespace, item.metadata.name), reverse=True)
        self._listed = [Placed(item.metadata.namespace, item.metadata.name, item, item.targets) for item in listed]
        self.settings: dict[str, TelemetrySettings] = {"": self._merged(self._levels(None))}
        """By key; the empty one is for what has none of its own."""

    def of(self, service: ServiceTarget) -> str:
        """The key of what holds for a service."""
        settings = self._merged(self._levels(service))
        if settings == self.settings[""]:
            return ""
        key = f"{service.kind}/{service.namespace}/{service.name}"
        self.settings[key] = settings
        return key

    def _levels(self, service: ServiceTarget | None) -> list[TelemetryObject]:
        places = [self._root_namespace, self._proxy.namespace, *([] if service is None else [service.namespace])]
        found: list[TelemetryObject] = []
        for namespace in dict.fromkeys(places):
            whole = [each.value for each in self._listed if not each.targets and each.namespace == namespace]
            found += whole[-1:]
        found += [each.value for each in self._listed if each.targets and applies_to_proxy(each, self._proxy, self._root_namespace)]
        if service is not None:
            found += [each.value for each in self._listed if each.targets and applies_to_service(each, service)]
        return found

    def _merged(self, levels: list[TelemetryObject]) -> TelemetrySettings:
        return TelemetrySettings(
            overrides=tuple(override for level in levels for part in level.metrics for override in part.overrides),
            access_logs=self._logs(levels),
            tracing=self._tracing(levels),
        )

    def _logs(self, levels: list[TelemetryObject]) -> tuple[AccessLog, ...]:
        """A level that names providers decides which there are; without names it speaks of those of the level above."""
        default = self._mesh.default_access_logging
        parts = [part for level in levels for part in level.logging]
        if not parts:
            names = default or ((BUILT_IN_LOG,) if self._mesh.access_log_file else ())
            return tuple(log for log in map(self._log, names) if log is not None)
        scope = next((part.providers for part in reversed(parts) if part.providers), default) or (BUILT_IN_LOG,)
        filters: dict[str, str] = {}
        inherited = default or (BUILT_IN_LOG,)
        for part in parts:
            inherited = part.providers or inherited
            for name in inherited:
                if name not in scope or not part.for_server:
                    continue
                if part.disabled:
                    filters.pop(name, None)
                else:
                    filters[name] = filters.get(name, "") if part.filter is None else part.filter
        logs = [(self._log(name), expression) for name, expression in filters.items()]
        return tuple(replace(log, filter=expression) for log, expression in logs if log is not None)

    def _log(self, name: str) -> AccessLog | None:
        mesh = self._mesh
        provider = mesh.providers.get(name)
        if provider is not None and provider.kind is ProviderKind.FILE_LOG:
            return AccessLog(name, provider.log_json, provider.log_template, provider.log_fields)
        if name == BUILT_IN_LOG:
            return AccessLog(name, mesh.access_log_json, mesh.access_log_template, mesh.access_log_fields)
        return None

    def _tracing(self, levels: list[TelemetryObject]) -> Tracing:
        mesh = self._mesh
        found = Tracing(percent=mesh.sampling, provider=next(iter(mesh.default_tracing), ""))
        for part in (part for level in levels for part in level.tracing if part.for_server):
            found = replace(
                found,
                provider=part.providers[0] if part.providers else found.provider,
                percent=found.percent if part.percent is None else part.percent,
                report=found.report if part.disable_reporting is None else not part.disable_reporting,
                propagate=found.propagate if part.disable_propagation is None else not part.disable_propagation,
                use_request_id=found.use_request_id if part.use_request_id is None else part.use_request_id,
                custom_tags=part.custom_tags or found.custom_tags,
            )
        provider = mesh.providers.get(found.provider)
        if provider is None or provider.kind not in (ProviderKind.OPENTELEMETRY, ProviderKind.ZIPKIN):
            return found
        collector = Collector.ZIPKIN
        if provider.kind is ProviderKind.OPENTELEMETRY:
            collector = Collector.OTLP_GRPC if provider.is_grpc else Collector.OTLP_HTTP
        cluster = self._find_cluster(provider.host, provider.namespace, provider.port, grpc=collector is Collector.OTLP_GRPC)
        return replace(found, cluster=cluster, http_path=provider.path, collector=collector, authority=f"{provider.host}:{provider.port}")


def extension_providers(mesh: MeshConfig, find_cluster: FindCluster) -> dict[str, ExtensionProvider]:
    """The external authorizers, by name."""
    kinds = {ProviderKind.AUTHZ_HTTP: AuthorizerKind.HTTP, ProviderKind.AUTHZ_GRPC: AuthorizerKind.GRPC}
    found = {}
    for name, provider in mesh.providers.items():
        kind = kinds.get(provider.kind)
        if kind is not None:
            is_grpc = kind is AuthorizerKind.GRPC
            found[name] = _authorizer(provider, kind, find_cluster(provider.host, provider.namespace, provider.port, grpc=is_grpc))
        elif provider.problem or provider.kind is not ProviderKind.OTHER:
            found[name] = ExtensionProvider(name, AuthorizerKind.HTTP, "", problem=provider.problem or "it is no external authorizer")
    return found


def _authorizer(provider: Provider, kind: AuthorizerKind, cluster: str) -> ExtensionProvider:
    return ExtensionProvider(
        name=provider.name,
        kind=kind,
        cluster=cluster,
        authority=provider.host,
        path_prefix=provider.path,
        timeout=provider.timeout,
        fail_open=provider.fail_open,
        status_on_error=provider.status_on_error,
        include_headers=provider.include_headers,
        add_headers=provider.add_headers,
        headers_upstream=provider.headers_upstream,
        headers_downstream_deny=provider.headers_downstream_deny,
        headers_downstream_allow=provider.headers_downstream_allow,
        body_bytes=provider.body_bytes,
        body_partial=provider.body_partial,
        problem="" if cluster else f"there is no service {provider.host} with port {provider.port}",
    )
