"""What an authority asks and tells a Kubernetes API server: whose a token is, where pods run, the state in a Secret, the bundle in
ConfigMaps.

Rights: create tokenreviews; list and watch pods; get, create and update one Secret; get, create and update ConfigMaps of one name; list and
watch namespaces if the bundle goes to all of them. `deploy/helm` grants these and no others.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ztunnel.ca.files import RootError
from ztunnel.ca.issuance import Caller, Reason, Refusal
from ztunnel.ca.keeper import Stored
from ztunnel.ca.pods import PodPlace, PodTable
from ztunnel.kube.client import KubeClient
from ztunnel.kube.discovery import Kind
from ztunnel.kube.errors import ApiRefused, BadAnswer, Conflict, NotFound, Overloaded, Unauthorized
from ztunnel.kube.reflector import Name
from ztunnel.kube.resources import CONFIG_MAPS, SECRETS, TOKEN_REVIEWS
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.core import TERMINAL_PHASES
from ztunnel.mesh.manifests.fields import Field

POD_KIND = Kind("", "Pod", ("v1",))
NAMESPACE_KIND = Kind("", "Namespace", ("v1",))
ROTATE = "ztunnel.io/rotate"
"""Annotation of the Secret: a new word asks for a new root."""
BUNDLE_KEY = "root-cert.pem"
"""Of the ConfigMaps; as Istio's."""

_ACCOUNT = "system:serviceaccount:"
_POD = "authentication.kubernetes.io/pod-name"
_POD_UID = "authentication.kubernetes.io/pod-uid"
_STATE_KEY = "authority.json"
_MANAGED_BY = {"app.kubernetes.io/managed-by": "ztunnel-ca"}


@dataclass(frozen=True, slots=True)
class ApiTokens:
    """Satisfies `service.TokenReviewer`. Each token is asked about: one of a pod that was deleted stops counting at once."""

    client: KubeClient
    audience: str

    async def review(self, token: str) -> Caller:
        """See `service.TokenReviewer`."""
        body = {
            "apiVersion": TOKEN_REVIEWS.api_version,
            "kind": TOKEN_REVIEWS.kind,
            "spec": {"token": token, "audiences": [self.audience]},
        }
        answer = await self.client.create(TOKEN_REVIEWS, body)
        try:
            return _caller(Field("TokenReview", "status", answer.get("status")), self.audience)
        except ManifestError as error:
            raise BadAnswer(f"the answer to a TokenReview cannot be read: {error}") from error


def _caller(status: Field, audience: str) -> Caller:
    if status.get("authenticated").absent or not status.get("authenticated").boolean():
        raise Refusal(Reason.TOKEN_REFUSED, f"the API server does not know the token: {status.get('error').text('no reason given')[:300]}")
    # A server that knows no audiences leaves the list out, and has then not checked ours.
    if audience not in [each.text() for each in status.get("audiences").items()]:
        raise Refusal(Reason.TOKEN_REFUSED, f"the token is not meant for {audience}")
    name = status.get("user").get("username").text()
    namespace, _, account = name.removeprefix(_ACCOUNT).partition(":")
    if not name.startswith(_ACCOUNT) or not namespace or not account:
        raise Refusal(Reason.TOKEN_REFUSED, f"{name[:200]} is no service account")
    extra = status.get("user").get("extra")
    return Caller(namespace, account, _first(extra.get(_POD)), _first(extra.get(_POD_UID)))


def _first(place: Field) -> str:
    values = place.items()
    return values[0].text() if values else ""


@dataclass(frozen=True, slots=True)
class PodStore:
    """Keeps a table of pods. Satisfies `kube.reflector.Store`."""

    table: PodTable

    def read(self, body: dict[str, object]) -> PodPlace | None:
        """See `Store`; None for a pod that has ended, or that cannot be read: it then counts as not there."""
        try:
            return _place(Field("Pod", "", body))
        except ManifestError:
            return None

    def replaced(self, items: Mapping[Name, PodPlace | None]) -> None:
        """See `Store`."""
        self.table.replace(place for place in items.values() if place is not None)

    def changed(self, name: Name, item: PodPlace | None) -> None:
        """See `Store`."""
        if item is None:
            self.table.remove(name.namespace, name.name)
        else:
            self.table.put(item)


def _place(pod: Field) -> PodPlace | None:
    metadata, spec = pod.get("metadata"), pod.get("spec")
    if pod.get("status").get("phase").text("") in TERMINAL_PHASES:
        return None
    # A mirror pod has none, and any node may make one in any namespace (NodeRestriction): it must not pass for that namespace's `default`.
    account = spec.get("serviceAccountName").name("")
    node = spec.get("nodeName").name("")
    return PodPlace(metadata.get("namespace").name(), metadata.get("name").name(), metadata.get("uid").text(), node, account)


@dataclass(slots=True)
class NamespaceStore:
    """Keeps namespaces' names. Satisfies `kube.reflector.Store`."""

    names: set[str] = field(default_factory=set)

    def read(self, body: dict[str, object]) -> bool | None:
        """See `Store`; None for one that is ending: nothing can be made in it any more."""
        metadata = body.get("metadata")
        return None if isinstance(metadata, dict) and metadata.get("deletionTimestamp") else True

    def replaced(self, items: Mapping[Name, bool | None]) -> None:
        """See `Store`."""
        self.names = {name.name for name, lives in items.items() if lives}

    def changed(self, name: Name, item: bool | None) -> None:
        """See `Store`."""
        if item:
            self.names.add(name.name)
        else:
            self.names.discard(name.name)


@dataclass(frozen=True, slots=True)
class SecretStore:
    """The authority's state in a Secret, changed only as long as its resourceVersion is the one that was read. Satisfies
    `keeper.StateStore`."""

    client: KubeClient
    namespace: str
    name: str

    async def read(self) -> Stored:
        """See `keeper.StateStore`."""
        try:
            body = await self.client.get(SECRETS, self.name, self.namespace)
        except NotFound:
            return Stored(None, "")
        place = Field(f"Secret {self.namespace}/{self.name}", "", body)
        try:
            wish = place.get("metadata").get("annotations").get(ROTATE)
            state = place.get("data").get(_STATE_KEY)
            document = None if state.absent else b64decode(state.text(), validate=True)
            version = place.get("metadata").get("resourceVersion").text()
            return Stored(document, version, "" if wish.absent or wish.value == "" else wish.text())
        except (ManifestError, Base64Error) as error:
            raise RootError(f"the authority's Secret cannot be read: {error}") from error

    async def write(self, document: bytes, former: Stored) -> bool:
        """See `keeper.StateStore`."""
        data = {_STATE_KEY: b64encode(document).decode()}
        metadata: dict[str, object] = {"name": self.name, "namespace": self.namespace, "labels": _MANAGED_BY}
        body = {"apiVersion": "v1", "kind": "Secret", "type": "ztunnel.io/authority", "metadata": metadata, "data": data}
        try:
            if not former.version:
                await self.client.create(SECRETS, body, self.namespace)
                return True
            # What others have put there (annotations, the wish above all) stays.
            present = await self.client.get(SECRETS, self.name, self.namespace)
            if _version(present) != former.version:
                return False
            await self.client.update(SECRETS, {**present, "data": {**_mapping(present.get("data")), **data}}, self.name, self.namespace)
            return True
        except (Conflict, NotFound):
            return False


@dataclass(frozen=True, slots=True)
class ConfigMaps:
    """The trust bundle in a ConfigMap of each namespace. Satisfies `keeper.Publisher`."""

    client: KubeClient
    name: str
    namespaces: Callable[[], Iterable[str]]

    async def publish(self, bundle_pem: bytes) -> None:
        """See `keeper.Publisher`; goes on with the others where one fails."""
        failures: list[Exception] = []
        for namespace in sorted(self.namespaces()):
            try:
                await self._publish(namespace, bundle_pem.decode())
            except (Unauthorized, Overloaded):
                raise
            except (ApiRefused, BadAnswer) as error:
                # The namespace is not there, or somebody wrote at the same moment: the next look mends it. Or what its owners have made
                # of it (an immutable ConfigMap, a quota) is in the way: their loss, not everybody's.
                failures.append(error)
        if failures:
            raise RootError(f"the roots are not published everywhere: {failures[0]}")

    async def _publish(self, namespace: str, text: str) -> None:
        try:
            present = await self.client.get(CONFIG_MAPS, self.name, namespace)
        except NotFound:
            metadata = {"name": self.name, "namespace": namespace, "labels": _MANAGED_BY}
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {BUNDLE_KEY: text}}
            await self.client.create(CONFIG_MAPS, body, namespace)
            return
        data = _mapping(present.get("data"))
        if data.get(BUNDLE_KEY) != text:
            await self.client.update(CONFIG_MAPS, {**present, "data": {**data, BUNDLE_KEY: text}}, self.name, namespace)


def _mapping(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _version(body: Mapping[str, object]) -> object:
    return _mapping(body.get("metadata")).get("resourceVersion")
