"""The limits of cgroups, on trees recorded from machines and containers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from recorded_tree import NO_LIMIT_V1, V1_MOUNTS, V2_MOUNT, plant

from raywb.nodes.cgroups import cpu_limit, memory_limit_bytes

GIB = 2**30
POD = "sys/fs/cgroup/kubepods/pod1"


def limits(root: Path, files: Mapping[str, str | bytes]) -> tuple[int | None, float | None]:
    plant(root, files)
    return memory_limit_bytes(root), cpu_limit(root)


def test_v2_in_a_container_of_its_own(tmp_path: Path) -> None:
    """A container with its own cgroup namespace finds its limits at the top of the mount."""
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/cpu.max": "150000 100000\n",
    }
    assert limits(tmp_path, files) == (4 * GIB, 1.5)


def test_v2_nested_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    """A limit further up holds, too, and `max` on the way is none."""
    files = {
        "proc/self/cgroup": "0::/kubepods/pod1/job\n",
        "proc/self/mountinfo": V2_MOUNT,
        f"{POD}/job/memory.max": "max\n",
        f"{POD}/job/cpu.max": "800000 100000\n",
        f"{POD}/memory.max": f"{2 * GIB}\n",
        f"{POD}/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/kubepods/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/kubepods/cpu.max": "max 100000\n",
        # The cgroup beside it is somebody else's.
        "sys/fs/cgroup/kubepods/pod2/memory.max": "4096\n",
    }
    assert limits(tmp_path, files) == (2 * GIB, 0.5)


def test_v2_without_limits(tmp_path: Path) -> None:
    """`max` everywhere is no limit, and so is a root that has no such files."""
    files = {
        "proc/self/cgroup": "0::/user.slice\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/user.slice/memory.max": "max\n",
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
    }
    assert limits(tmp_path, files) == (None, None)


def test_v1_each_controller_has_its_own_place(tmp_path: Path) -> None:
    """The process lies in different cgroups for memory and CPU; a quota of -1 is none."""
    files = {
        "proc/self/cgroup": "9:memory:/a/b\n4:cpu,cpuacct:/c/d\n1:name=systemd:/x\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS,
        "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": NO_LIMIT_V1,
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
        "sys/fs/cgroup/cpu,cpuacct/c/d/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/c/d/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "125000\n",
        "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "50000\n",
    }
    assert limits(tmp_path, files) == (3 * GIB, 2.5)


def test_v1_in_a_docker_container(tmp_path: Path) -> None:
    """The path is the host's, what is mounted is the container's own part; its ancestors, which
    are not mounted, show in the kernel's sum."""
    mounts = "40 31 0:32 /docker/ab12 /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n"
    files = {
        "proc/self/cgroup": "9:memory:/docker/ab12\n",
        "proc/self/mountinfo": mounts,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{6 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache 1\nhierarchical_memory_limit {5 * GIB}\nx 2\n",
    }
    assert limits(tmp_path, files) == (5 * GIB, None)


@pytest.mark.parametrize("top", ["/docker/ab12", "/", "/../.."])
@pytest.mark.parametrize("place", ["/docker/other", "/../../elsewhere", "", "/docker"])
def test_a_place_that_is_not_mounted(tmp_path: Path, place: str, top: str) -> None:
    """Where the process's path is not below what is mounted, the mounted part is its own."""
    files = {
        "proc/self/cgroup": f"0::{place}\n",
        "proc/self/mountinfo": V2_MOUNT.replace(" / /sys", f" {top} /sys"),
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/elsewhere/memory.max": "4096\n",
    }
    assert limits(tmp_path, files)[0] == GIB


def test_v1_and_v2_beside_each_other(tmp_path: Path) -> None:
    """A hybrid machine mounts v2 without controllers; v1 has the limits."""
    files = {
        "proc/self/cgroup": "4:memory:/job\n0::/job\n",
        "proc/self/mountinfo": V1_MOUNTS + V2_MOUNT.replace("/cgroup rw", "/cgroup/unified rw"),
        "sys/fs/cgroup/unified/job/cgroup.procs": "1\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{GIB}\n",
    }
    assert limits(tmp_path, files)[0] == GIB


def test_without_a_list_of_mounts(tmp_path: Path) -> None:
    """A sandbox that does not show its mounts has its cgroups where they usually are."""
    files = {"sys/fs/cgroup/memory.max": f"{GIB}\n", "sys/fs/cgroup/cpu.max": "200000"}
    assert limits(tmp_path, files) == (GIB, 2.0)


@pytest.mark.parametrize("content", ["", "\n", "lots", "-5", "0", "1e9", "9" * 40, b"\xff\xfe\x00"])
def test_what_is_no_number_is_no_limit(tmp_path: Path, content: str | bytes) -> None:
    """Files with anything else in them are passed over."""
    files = {
        "proc/self/cgroup": b"nonsense\n0:\n::\n0::/\xff\n",
        "proc/self/mountinfo": V2_MOUNT + "short line\n - cgroup2\n",
        "sys/fs/cgroup/memory.max": content,
        "sys/fs/cgroup/cpu.max": content,
    }
    assert limits(tmp_path, files) == (None, None)


def test_nothing_there(tmp_path: Path) -> None:
    """An empty tree has no limits."""
    assert limits(tmp_path, {}) == (None, None)


@pytest.fixture
def real_groups() -> Iterator[list[Path]]:
    """Cgroups of this machine with 256 MiB and one and a half CPUs; skips where none can be had."""
    files = [
        ("memory", "memory.limit_in_bytes", str(2**28)),
        ("cpu", "cpu.cfs_quota_us", "150000"),
        ("", "memory.max", str(2**28)),
        ("", "cpu.max", "150000 100000"),
    ]
    made: list[Path] = []
    try:
        for hierarchy, name, value in files:
            path = Path("/sys/fs/cgroup", hierarchy, f"raywb-test-limits-{os.getpid()}")
            try:
                path.mkdir(exist_ok=path in made)
                if path not in made:
                    made.append(path)
                if (path / name).exists():
                    (path / name).write_text(value)
            except OSError:
                continue
        made = [path for path in made if (path / "cgroup.procs").exists()]
        if not made:
            pytest.skip("no cgroup can be made here")
        yield made
    finally:
        for path in made:
            path.rmdir()


def test_the_real_limits_of_this_machine(real_groups: list[Path]) -> None:
    """A process that was put into cgroups finds the limits that they have."""
    program = f"""
import json, os
for path in {[str(path) for path in real_groups]!r}:
    open(path + "/cgroup.procs", "w").write(str(os.getpid()))
from raywb.nodes.cgroups import cpu_limit, memory_limit_bytes
print(json.dumps([memory_limit_bytes(), cpu_limit()]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    memory, cpus = json.loads(done.stdout)
    there = {name for path in real_groups for name in os.listdir(path)}
    if there & {"memory.limit_in_bytes", "memory.max"}:
        assert memory == 2**28
    if there & {"cpu.cfs_quota_us", "cpu.max"}:
        assert cpus == 1.5
