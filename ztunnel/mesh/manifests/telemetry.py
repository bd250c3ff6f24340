"""Telemetry (telemetry.istio.io): what of metrics, access logs and spans is changed, and for whom.

Expressions are compiled while reading, so that a bad one is refused where it is written. `match.mode` CLIENT is not for a waypoint.
Source: Istio API reference of Telemetry.
"""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.mesh.l7.evaluation import ExpressionError
from ztunnel.mesh.l7.expressions import Expression
from ztunnel.mesh.l7.telemetry import CustomTag, Metric, MetricOverride
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC, TargetRef, read_selector, read_targets
from ztunnel.mesh.manifests.values import choice, header_name, number, positive_duration

TELEMETRY_GROUP = "telemetry.istio.io"
_MODES = ("CLIENT_AND_SERVER", "CLIENT", "SERVER")
_LONGEST_LABEL = 128


@dataclass(frozen=True, slots=True)
class MetricsPart:
    """One of `metrics`."""

    providers: tuple[str, ...] = ()
    overrides: tuple[MetricOverride, ...] = ()


@dataclass(frozen=True, slots=True)
class LoggingPart:
    """One of `accessLogging`. `filter`: None where nothing is said."""

    providers: tuple[str, ...] = ()
    disabled: bool = False
    filter: str | None = None
    for_server: bool = True


@dataclass(frozen=True, slots=True)
class TracingPart:
    """One of `tracing`; None is what it does not say."""

    providers: tuple[str, ...] = ()
    percent: float | None = None
    disable_reporting: bool | None = None
    disable_propagation: bool | None = None
    use_request_id: bool | None = None
    custom_tags: tuple[CustomTag, ...] = ()
    for_server: bool = True


@dataclass(frozen=True, slots=True)
class TelemetryObject:
    """One Telemetry."""

    metadata: Metadata
    targets: tuple[TargetRef, ...] = ()
    selects: bool = False
    """It has a selector: for pods, which no waypoint is."""
    metrics: tuple[MetricsPart, ...] = ()
    logging: tuple[LoggingPart, ...] = ()
    tracing: tuple[TracingPart, ...] = ()


def read_telemetry(document: Field) -> TelemetryObject:
    """A Telemetry.

    Raises:
        ManifestError: an unknown field, an expression that cannot be used, or a value that is not what it should be.
    """
    document.only(SPEC)
    spec = document.get("spec")
    spec.only(("selector", "targetRef", "targetRefs", "tracing", "metrics", "accessLogging"))
    return TelemetryObject(
        metadata=read_metadata(document),
        targets=read_targets(spec),
        selects=bool(read_selector(spec)),
        metrics=tuple(_metrics(item) for item in spec.get("metrics").items(64)),
        logging=tuple(_logging(item) for item in spec.get("accessLogging").items(64)),
        tracing=tuple(_tracing(item) for item in spec.get("tracing").items(64)),
    )


def _providers(place: Field) -> tuple[str, ...]:
    found: list[str] = []
    for item in place.get("providers").items(16):
        item.only(("name",))
        found.append(item.get("name").text())
    return tuple(dict.fromkeys(found))


def _for_server(place: Field) -> bool:
    match = place.get("match")
    match.only(("mode", "metric", "customMetric"))
    return choice(match.get("mode"), _MODES, "CLIENT_AND_SERVER") != "CLIENT"


def _metrics(place: Field) -> MetricsPart:
    place.only(("providers", "overrides", "reportingInterval"))
    if not place.get("reportingInterval").absent:
        positive_duration(place.get("reportingInterval"))
    overrides = [override for item in place.get("overrides").items(128) for override in _override(item)]
    return MetricsPart(_providers(place), tuple(overrides))


def _override(place: Field) -> list[MetricOverride]:
    place.only(("match", "disabled", "tagOverrides"))
    match = place.get("match")
    if not match.get("customMetric").absent:
        raise match.get("customMetric").error("only Istio's standard metrics exist here")
    name = choice(match.get("metric"), ("ALL_METRICS", *(metric.value for metric in Metric)), "ALL_METRICS")
    metrics = list(Metric) if name == "ALL_METRICS" else [Metric(name)]
    disabled = place.get("disabled").boolean()
    tags = tuple(_tag(key, member) for key, member in place.get("tagOverrides").texts())
    if not _for_server(place):
        return []
    return [MetricOverride(metric, disabled, tags) for metric in metrics]


def _tag(label: str, place: Field) -> tuple[str, str | None]:
    place.only(("operation", "value"))
    if not label.isidentifier() or not label.isascii() or len(label) > _LONGEST_LABEL:
        raise place.error("not the name of a label (letters, digits and _)")
    if choice(place.get("operation"), ("UPSERT", "REMOVE"), "UPSERT") == "REMOVE":
        return label, None
    return label, _expression(place.get("value"))


def _expression(place: Field) -> str:
    text = place.text()
    try:
        Expression(text)
    except ExpressionError as error:
        raise place.error(str(error)) from error
    return text


def _logging(place: Field) -> LoggingPart:
    place.only(("match", "providers", "disabled", "filter"))
    filtered = place.get("filter")
    filtered.only(("expression",))
    expression = None if filtered.absent else _expression(filtered.get("expression"))
    return LoggingPart(_providers(place), place.get("disabled").boolean(), expression, _for_server(place))


def _tracing(place: Field) -> TracingPart:
    place.only(
        (
            *("match", "providers", "randomSamplingPercentage", "disableSpanReporting", "customTags", "useRequestIdForTraceSampling"),
            *("enableIstioTags", "disableContextPropagation"),
        )
    )
    percent = place.get("randomSamplingPercentage")
    return TracingPart(
        providers=_providers(place),
        percent=None if percent.absent else number(percent, 0, 100),
        disable_reporting=_said(place.get("disableSpanReporting")),
        disable_propagation=_said(place.get("disableContextPropagation")),
        use_request_id=_said(place.get("useRequestIdForTraceSampling")),
        custom_tags=tuple(_custom_tag(key, member) for key, member in place.get("customTags").texts()),
        for_server=_for_server(place),
    )


def _said(place: Field) -> bool | None:
    return None if place.absent else place.boolean()


def _custom_tag(name: str, place: Field) -> CustomTag:
    place.only(("literal", "environment", "header", "formatter"))
    kinds = [kind for kind in ("literal", "environment", "header", "formatter") if not place.get(kind).absent]
    if len(kinds) != 1:
        raise place.error("exactly one of literal, environment, header, formatter")
    kind = kinds[0]
    member = place.get(kind)
    if kind in ("literal", "formatter"):
        member.only(("value",))
        return CustomTag(name, kind, member.get("value").text())
    member.only(("name", "defaultValue"))
    value = header_name(member.get("name")) if kind == "header" else member.get("name").text()
    return CustomTag(name, kind, value, member.get("defaultValue").text(""))
