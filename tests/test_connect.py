"""When start() may start a cluster: only where there is none, not where one does not answer."""

from __future__ import annotations

import pytest
from ray_cluster import driver_alone


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_not_replaced() -> None:
    """RAY_ADDRESS names one that is dead: start(local_cluster=True) says so, and starts none."""
    script = """
        import ray, raywb
        from raywb.errors import NoClusterError
        from ray_cluster import report

        try:
            raywb.start(project="x", local_cluster=True)
        except NoClusterError as error:
            report([str(error), ray.is_initialized()])
    """
    impatient = {
        "RAY_gcs_rpc_server_connect_timeout_s": "1",
        "RAY_gcs_server_request_timeout_seconds": "1",
        "RAY_NUM_REDIS_GET_RETRIES": "1",
        "RAY_py_gcs_connect_timeout_s": "1",
    }
    with driver_alone(script, {"RAY_ADDRESS": "127.0.0.1:9", **impatient}) as driver:
        said, connected = driver.next_report()
        assert "Failed to connect to Ray cluster at" in said
        assert not connected
        assert driver.wait() == 0
