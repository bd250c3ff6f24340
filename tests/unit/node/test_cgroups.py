"""A pod's UID in every spelling of a control group, and in nothing else."""

from __future__ import annotations

import pytest

from ztunnel.node.cgroups import plain_uid, pod_of

UID = "2c48913c-b29f-11e7-9350-020968147796"
SNAKE = UID.replace("-", "_")
STATIC = "b0ad13e2a1c84c6fb3f1e1d1b2c3d4e5"
"""Of a static pod: kubelet hashes its manifest."""
CONTAINER = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961"


@pytest.mark.parametrize(
    "path",
    [
        f"/kubepods/pod{UID}/{CONTAINER}",
        f"/kubepods/burstable/pod{UID}/{CONTAINER}",
        f"/kubepods/besteffort/pod{UID}",
        f"/kubepods.slice/kubepods-pod{SNAKE}.slice/cri-containerd-{CONTAINER}.scope",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SNAKE}.slice/crio-{CONTAINER}.scope",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SNAKE}.slice/crio-{CONTAINER}.scope/container",
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SNAKE}.slice/docker-{CONTAINER}.scope/init.scope",
        f"/system.slice/containerd.service/kubepods-burstable-pod{SNAKE}.slice:cri-containerd:{CONTAINER}",
        f"/../../pod{UID}/{CONTAINER}",
        f"/../../../kubepods-pod{SNAKE}.slice/cri-containerd-{CONTAINER}.scope",
        f"/docker/{CONTAINER}/kubelet/kubepods/pod{UID}/{CONTAINER}",
        f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{SNAKE}.slice/cri-containerd-{CONTAINER}.scope",
        f"/kubepods/pod{UID.upper()}/{CONTAINER}",
        f"/kubepods/pod{UID}/{CONTAINER}/kubepods/pod11111111-2222-3333-4444-555555555555/x",
    ],
)
def test_spellings(path: str) -> None:
    assert pod_of(f"0::{path}\n") == plain_uid(UID)


def test_a_pod_of_a_node_that_is_in_a_pod() -> None:
    outer = "/kubepods/pod11111111-2222-3333-4444-555555555555"
    listing = f"0::{outer}/kubelet/kubepods/pod{UID}/{CONTAINER}\n"
    assert pod_of(listing, f"0::{outer}/init.scope\n") == plain_uid(UID)
    assert pod_of(f"0::{outer}/kubelet\n", f"0::{outer}/init.scope\n") is None


def test_a_static_pod() -> None:
    assert pod_of(f"0::/kubepods/pod{STATIC}/{CONTAINER}\n") == STATIC


def test_hierarchies_of_version_1_agree() -> None:
    path = f"/kubepods/pod{UID}/{CONTAINER}"
    listing = f"11:memory:{path}\n3:cpu,cpuacct:{path}\n1:name=systemd:/kubepods/pod{UID}/x\n0::/\n"
    assert pod_of(listing) == plain_uid(UID)


def test_hierarchies_that_disagree_are_not_believed() -> None:
    assert pod_of(f"2:cpu:/kubepods/pod{UID}/a\n1:memory:/kubepods/pod{STATIC}/a\n") is None


@pytest.mark.parametrize(
    "listing",
    [
        "",
        "\n:\n::\nnonsense",
        "0::/system.slice/kubelet.service\n",
        f"0::/kubepods/pod{UID[:-1]}/x\n",
        f"0::/kubepods/pod{UID}0/x\n",
        f"0::/kubepods/tripod{UID}/x\n",
        f"0::/kubepods/{UID}/x\n",
        f"0::/kubepods/pod{UID.replace('-', '_', 1)}/x\n",
        f"0::/pod{UID}suffix/x\n",
    ],
)
def test_what_names_no_pod(listing: str) -> None:
    assert pod_of(listing) is None
