"""Parts of /proc, /sys, /run and /dev as real machines show them, laid out in a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["NO_LIMIT_V1", "V1_MOUNTS", "V2_MOUNT", "plant"]

#: What cgroups v1 write where there is no memory limit, with pages of 4 KiB.
NO_LIMIT_V1 = "9223372036854771712\n"

V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"

#: Lines among others, as they are on every machine; one point has a space in its name.
V1_MOUNTS = (
    "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /mnt/my\\040disk rw,relatime - ext4 /dev/sdb1 rw\n"
)


def plant(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write the files below a directory, and return it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root
