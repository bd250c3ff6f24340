"""Which pod a process belongs to, by the path of its control group. PURE.

Container runtimes put a pod's UID there, each in its own spelling:

    0::/kubepods/burstable/pod2c48913c-b29f-11e7-9350-020968147796/9bca8d63d5fa      kubelet's driver cgroupfs
    0::/kubepods.slice/kubepods-pod2c48913c_b29f_11e7_9350_020968147796.slice/cri-containerd-9bca8d63d5fa.scope    systemd
    0::/system.slice/containerd.service/kubepods-pod2c48913c_b29f_11e7_9350_020968147796.slice:cri-containerd:9bca8d63d5fa
    0::/../../pod2c48913c-b29f-11e7-9350-020968147796/9bca8d63d5fa                   seen from another cgroup namespace

Source: cgroups(7), "/proc/[pid]/cgroup"; Kubernetes pkg/kubelet/cm/pod_container_manager_linux.go.
"""

from __future__ import annotations

import re

_POD = re.compile(
    r"""
    (?: ^ | [/-] ) pod
    ( [0-9a-f]{8} ([-_]?) [0-9a-f]{4} \2 [0-9a-f]{4} \2 [0-9a-f]{4} \2 [0-9a-f]{12} )
    (?: \.slice )? (?= [/:] | $ )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def pod_of(listing: str, host: str = "") -> str | None:
    """The UID of the pod of a process, in the form of `plain_uid`; None when it is in none, or in two.

    The outermost pod counts: below its own control group a container may be let make others, of any name.

    Args:
        listing: its /proc/[pid]/cgroup: one line per hierarchy, `ID:controllers:path`.
        host: that of process 1. A node may be in a pod of another cluster itself; that pod does not count.
    """
    around = {plain_uid(uid) for line in host.splitlines() for uid in _uids(line)}
    found = set()
    for line in listing.splitlines():
        inside = [uid for uid in map(plain_uid, _uids(line)) if uid not in around]
        if inside:
            found.add(inside[0])
    return found.pop() if len(found) == 1 else None


def _uids(line: str) -> list[str]:
    return [match[0] for match in _POD.findall(line.split(":", 2)[-1])]


def plain_uid(uid: str) -> str:
    """A UID without what spellings differ in."""
    return uid.replace("-", "").replace("_", "").lower()
