"""What an import and an ``attach()`` take."""

from __future__ import annotations

import statistics
import subprocess
import sys

from ray_cluster import RayCluster

from tests.bench.table import Line

_IMPORT = """
import time
import ray
began = time.perf_counter()
import raywb
raywb.attach, raywb.start
print(time.perf_counter() - began)
"""

_ATTACH = """
import time
import ray, raywb
from ray_cluster import report, told

ray.init(log_to_driver=False)
raywb.start(project="bench", mode="disabled")
attaches = told()
times = []
for number in range(attaches):
    began = time.perf_counter()
    raywb.attach(f"stage_{number}")
    times.append(time.perf_counter() - began)
report(times)
raywb.lifecycle.stop_service()
"""


def measure(*, quick: bool) -> list[Line]:
    """Lines on how a process begins."""
    imports = [
        float(
            subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True).stdout
        )
        for _ in range(3 if quick else 9)
    ]
    import_ms = statistics.median(imports) * 1e3
    with RayCluster.start(num_cpus=2) as cluster:
        driver = cluster.driver(_ATTACH)
        driver.tell(20 if quick else 100)
        first, *warm = driver.next_report()
    attach_ms = statistics.median(warm) * 1e3
    return [
        Line(
            "import raywb",
            f"{import_ms:.0f} ms",
            "wanted: at most 50 ms over import ray",
            f"attach and start looked up, after import ray; median of {len(imports)} processes",
            import_ms <= 50.0,
        ),
        Line(
            "attach(), warm",
            f"median {attach_ms:.1f} ms, longest {max(warm) * 1e3:.1f} ms",
            "wanted: at most 20 ms",
            f"{len(warm)} times in a driver of a real cluster; the first took {first * 1e3:.0f} ms",
            attach_ms <= 20.0,
        ),
    ]
