"""Names, UIDs, times and owners."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, ObjectKey, read_metadata


def read(**metadata: object) -> Metadata:
    return read_metadata(Field("Pod default/x", "", {"metadata": {"name": "x", **metadata}}))


def test_keys_read_as_people_write_them() -> None:
    assert str(ObjectKey("Pod", "default", "x")) == "Pod default/x"
    assert str(ObjectKey("Namespace", "", "x")) == "Namespace x"


def test_what_is_left_out_has_defaults() -> None:
    assert read() == Metadata("x", "default", "default.x")


def test_everything_is_read() -> None:
    found = read(
        namespace="shop",
        uid="1234-abcd",
        labels={"app": "x"},
        annotations={"note": "any text\n", "empty": ""},
        creationTimestamp="2026-01-02T03:04:05Z",
        deletionTimestamp="2026-01-02T03:04:05Z",
        ownerReferences=[{"kind": "Other", "name": "o"}, {"kind": "ReplicaSet", "name": "x-1", "controller": True}],
        managedFields=[1],
    )
    assert found == Metadata(
        name="x",
        namespace="shop",
        uid="1234-abcd",
        labels={"app": "x"},
        annotations={"note": "any text\n", "empty": ""},
        created="2026-01-02T03:04:05+00:00",
        deleting=True,
        owner=("ReplicaSet", "x-1"),
    )


def test_cluster_scoped_objects_have_no_namespace() -> None:
    found = read_metadata(Field("Namespace x", "", {"metadata": {"name": "x", "namespace": "ignored"}}), namespaced=False)
    assert found == Metadata("x", "", "x")
    with pytest.raises(ManifestError, match=r"metadata\.name: not a namespace"):
        read_metadata(Field("Namespace x.y", "", {"metadata": {"name": "x.y"}}), namespaced=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        ("2026-01-02T03:04:05+02:00", "2026-01-02T01:04:05+00:00"),
        (datetime(2026, 1, 2, 3, 4, 5), "2026-01-02T03:04:05+00:00"),  # what a YAML loader makes of an unquoted time
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
    ],
)
def test_times_become_utc_text(value: object, expected: str) -> None:
    assert read(creationTimestamp=value).created == expected


@pytest.mark.parametrize("value", ["yesterday", 5, datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))), "9999-12-31T23:59:59-05:00"])
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(ManifestError, match=r"metadata\.creationTimestamp: not a time"):
        read(creationTimestamp=value)


@pytest.mark.parametrize("uid", ["../etc", "a/b", ".", "", "x" * 129, 5])
def test_a_uid_is_safe_as_a_file_name(uid: object) -> None:
    with pytest.raises(ManifestError, match=r"metadata\.uid"):
        read(uid=uid)


def test_a_long_name_still_has_a_uid() -> None:
    assert read(name="x" * 253).uid == "default." + "x" * 253


def test_wrong_types_name_their_place() -> None:
    with pytest.raises(ManifestError, match=r'metadata\.annotations\["istio.io/dry-run"\]: not text \(quote it\): true'):
        read(annotations={"istio.io/dry-run": True})
    with pytest.raises(ManifestError, match=r"metadata\.ownerReferences\[0\]\.controller: not a boolean"):
        read(ownerReferences=[{"controller": "yes"}])
    with pytest.raises(ManifestError, match=r"metadata: not a mapping"):
        read_metadata(Field("Pod x", "", {"metadata": []}))
