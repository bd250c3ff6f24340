"""Real processes: what they cost and that they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.benchmarks import processes

DONE = "print('done', flush=True)\nimport sys; sys.stdin.read()"
BUSY = f"import time\nwhile time.process_time() < 0.05: pass\n{DONE}"
BURN = "import time\nwhile time.thread_time() < 0.2: pass"
PARENT = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])"


def test_a_tree_is_counted_with_its_children() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        assert len(processes.tree([process.pid])) == 2
        assert set(processes.descendants(os.getpid())) >= {process.pid, *processes.descendants(process.pid)}
        assert processes.cpu_seconds(processes.tree([process.pid])) - processes.cpu_seconds([process.pid]) >= 0.05
        assert processes.resident_bytes(process.pid) > 1 << 20
        process.communicate()
    assert processes.cpu_seconds([process.pid]) == 0


def test_the_time_of_threads_that_have_ended_counts() -> None:
    program = f"import threading\nthread = threading.Thread(target=exec, args=({BURN!r},))\nthread.start()\nthread.join()\n{DONE}"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
        assert processes.cpu_seconds([process.pid]) >= 0.2
        process.communicate()


def test_a_process_is_bound_to_a_cpu() -> None:
    cpu = min(os.sched_getaffinity(0))
    with subprocess.Popen(["sleep", "5"]) as process:
        processes.pin([process.pid], None)
        assert os.sched_getaffinity(process.pid) == os.sched_getaffinity(0)
        processes.pin([process.pid], cpu)
        assert os.sched_getaffinity(process.pid) == {cpu}
        process.kill()
    assert processes.pinned(3) == ["taskset", "-c", "3"]
    assert processes.pinned(None) == []


def test_a_process_ends_with_its_block(tmp_path: Path) -> None:
    with processes.running(["sleep", "60"], tmp_path / "log") as process:
        assert process.poll() is None
    assert process.returncode is not None


@pytest.mark.parametrize("ended_by", ["its end", "SIGTERM"])
def test_nothing_outlives_the_benchmark(ended_by: str) -> None:
    # The child that is left behind by a parent which ends at once is the hard case: nobody knows its pid.
    left_behind = "import subprocess\nsubprocess.Popen(['sleep', '61'])"
    program = f"""
import os, signal, subprocess, sys, time
from scripts.benchmarks import processes
try:
    with processes.ending_all():
        subprocess.run([sys.executable, "-c", {left_behind!r}])
        print(processes.descendants(os.getpid())[0], flush=True)
        if {ended_by!r} == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == (130 if ended_by == "SIGTERM" else 0), done.stderr
    orphan = Path("/proc") / done.stdout.strip()
    deadline = time.monotonic() + 30
    while orphan.exists():
        assert time.monotonic() < deadline
