"""The mesh's own configuration among the objects of a source: the ConfigMap `istio` of the root namespace, opened."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.mesh_config import CONFIG_KEY, CONFIG_MAP, STRICTEST, MeshConfig, read_mesh_config
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.secrets import ConfigMapObject
from ztunnel.runtime.documents import DocumentError, read_yaml


def mesh_config_of(objects: Mapping[ObjectKey, KubeObject], root_namespace: str) -> MeshConfig:
    """What it says; Istio's defaults where it is missing. `problems` tell what could not be used."""
    key = ObjectKey("ConfigMap", root_namespace, CONFIG_MAP)
    item = objects.get(key)
    text = item.texts.get(CONFIG_KEY, "") if isinstance(item, ConfigMapObject) else ""
    if not text:
        return MeshConfig()
    subject = f"{key} {CONFIG_KEY}"
    try:
        documents = list(read_yaml(text.encode()))
    except DocumentError as error:
        return MeshConfig(path_normalization=STRICTEST, problems=(f"{subject}: {error}",))
    body = documents[0] if documents else None
    if not isinstance(body, dict):
        return MeshConfig(path_normalization=STRICTEST, problems=(f"{subject}: not a mapping",)) if body is not None else MeshConfig()
    return read_mesh_config(Field(subject, "", _with_format(body)))


def _with_format(body: dict[object, object]) -> dict[object, object]:
    """`accessLogFormat` of a JSON log is a text that is a JSON object."""
    form = body.get("accessLogFormat")
    if body.get("accessLogEncoding") != "JSON" or not isinstance(form, str) or not form.strip():
        return body
    try:
        return {**body, "accessLogFormat": json.loads(form)}
    except (ValueError, RecursionError):
        return body
