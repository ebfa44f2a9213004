"""How busy nodes are, as Ray's agents say: a recorded answer, and servers that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from aiohttp import web

from raywb.nodes import utilization
from raywb.nodes.utilization import (
    MAX_SERIES_NODES,
    NodeEndpoint,
    Reading,
    metrics_of,
    parse_metrics,
    read_nodes,
)

#: Recorded from the agent of a node with two GPUs (Ray 2.60.0), less most of what Ray says of its
#: own calls, and of the labels.
RECORDED = """\
# HELP ray_grpc_server_req_new_total New request number in grpc server
# TYPE ray_grpc_server_req_new_total counter
ray_grpc_server_req_new_total{Method="A{b}\\"c",Component="raylet"} 24.0
# HELP ray_node_mem_used Memory usage on a ray node
# TYPE ray_node_mem_used gauge
ray_node_mem_used{IsHeadNode="true",RayNodeType="head",ip="192.0.2.2"} 3.221225472e+09
# HELP ray_node_mem_total Total memory on a ray node
# TYPE ray_node_mem_total gauge
ray_node_mem_total{IsHeadNode="true",RayNodeType="head",ip="192.0.2.2"} 1.2884901888e+010
ray_node_cpu_utilization{IsHeadNode="true",RayNodeType="head",ip="192.0.2.2"} 57.4
ray_node_disk_utilization_percentage{ip="192.0.2.2"} 31.294891052348532
ray_node_disk_io_read_speed{ip="192.0.2.2"} 2.5e+06
ray_node_disk_io_write_speed{ip="192.0.2.2"} 38.23595145638461
ray_node_network_send_speed{ip="192.0.2.2"} 1.25e+08
ray_node_network_receive_speed{ip="192.0.2.2"} 0.0
ray_node_gpus_available{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="0"} 1.0
ray_node_gpus_utilization{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="0"} 0.0
ray_node_gpus_utilization{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="1"} 40.0
ray_node_gram_used{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="0"} 20480.0
ray_node_gram_used{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="1"} 0.0
ray_node_gram_available{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="0"} 61440.0
ray_node_gram_available{GpuDeviceName="NVIDIA H100 80GB HBM3",GpuIndex="1"} 81920.0
ray_object_store_used_memory{Component="raylet",WorkerId=""} 2.5e+07
ray_object_store_available_memory{Component="raylet",WorkerId=""} 7.5e+07
ray_object_store_memory{Component="core_worker",Location="WORKER_HEAP"} 12.0
"""

VALUES = {
    "cpu_percent": 57.4,
    "memory_used_gb": 3.0,
    "memory_percent": 25.0,
    "disk_percent": 31.2949,
    "disk_read_mb_per_s": 2.5,
    "disk_write_mb_per_s": 0.0,
    "network_sent_mb_per_s": 125.0,
    "network_received_mb_per_s": 0.0,
    "object_store_used_gb": 0.0233,
    "object_store_percent": 25.0,
    "gpu_memory_used_gb": 20.0,
    "gpu_memory_percent": 12.5,
    "gpu_percent": 20.0,
    "gpus_idle": 1.0,
}


def test_a_recorded_answer_has_believable_values() -> None:
    """Bytes become GB, Ray's MiB of GPU memory too; GPUs are summed up."""
    reading = parse_metrics(RECORDED)
    assert reading.values == VALUES
    assert reading.gpus_percent == [0.0, 40.0]


def test_what_the_agent_does_not_say_is_left_out() -> None:
    """A node without GPUs has no GPU series, and what a driver does not tell is no idle GPU."""
    assert parse_metrics("ray_node_cpu_utilization 3.0\n") == Reading({"cpu_percent": 3.0}, [])
    of_mig = parse_metrics('ray_node_gpus_utilization{GpuIndex="0"} -1.0\n')
    assert of_mig == Reading({}, [])
    with pytest.raises(ValueError, match=r".*"):
        parse_metrics("ray_node_cpu_utilization{ nonsense")


def test_a_row_has_each_node_the_means_and_the_idle_share() -> None:
    """A mean is over the nodes that have the value; who did not answer is a gap."""
    readings = {
        "a": Reading({"cpu_percent": 10.0, "gpu_percent": 0.0}, [0.0, 0.0, 4.9, 90.0]),
        "b": Reading({"cpu_percent": 30.0}, []),
    }
    assert metrics_of(readings, alive=3) == {
        "nodes/alive": 3,
        "nodes/answered": 2,
        "nodes/a/cpu_percent": 10.0,
        "nodes/a/gpu_percent": 0.0,
        "nodes/b/cpu_percent": 30.0,
        "nodes/mean/cpu_percent": 20.0,
        "nodes/mean/gpu_percent": 0.0,
        "nodes/gpu_idle_share": 0.75,
    }
    assert metrics_of({}, alive=3) == {}


def test_a_row_of_a_thousand_nodes_is_no_longer_than_that_of_a_hundred() -> None:
    """Above the limit a row has mean, min and max of all nodes, and none of a single one."""
    rows = []
    for count in (100, 1000):
        readings = {f"n{k}": Reading({**VALUES, "cpu_percent": k}, [1.0]) for k in range(count)}
        rows.append(metrics_of(readings, alive=count))
    hundred, thousand = rows
    assert hundred.keys() == thousand.keys()
    assert len(thousand) == 3 * len(VALUES) + 3
    values = [thousand[f"nodes/{kind}/cpu_percent"] for kind in ("min", "mean", "max")]
    assert values == [0, 499.5, 999]
    assert "nodes/n0/cpu_percent" in metrics_of({"n0": Reading(VALUES, [])}, MAX_SERIES_NODES)


def serve_and_read(
    answers: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]],
) -> tuple[dict[str, Reading], dict[str, str]]:
    """Read nodes, each of which has an agent that answers in its own way."""

    async def work() -> tuple[dict[str, Reading], dict[str, str]]:
        runners, endpoints = [], [NodeEndpoint("no port", "127.0.0.1", 0)]
        for name, answer in answers.items():
            app = web.Application()
            app.router.add_get("/metrics", answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            runners.append(runner)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            endpoints.append(NodeEndpoint(name, "127.0.0.1", runner.addresses[0][1]))
        try:
            return await read_nodes(endpoints)
        finally:
            for runner in runners:
                await runner.cleanup()

    return asyncio.run(work())


async def well(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    data = RECORDED.encode()
    cuts = [0, 1, 700, 701, 1500, len(data)]  # in the middle of lines
    for start, end in pairwise(cuts):
        await response.write(data[start:end])
        await asyncio.sleep(0.01)
    return response


async def hanging(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(5)
    return web.Response()


async def failing(request: web.Request) -> web.StreamResponse:
    raise web.HTTPInternalServerError


async def flooding(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(1000):
        await response.write(b"ray_other 1.0\n" * 1000)
    return response


async def endless_line(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b"ray_node_" + b"x" * 100_000)


async def nonsense(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ray_node_cpu_utilization{{{ 1\n")


async def not_text(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b'ray_node_x{a="\xff"} 1\n')


async def silent(request: web.Request) -> web.StreamResponse:
    return web.Response(text="ray_other 1.0\n")


async def elsewhere(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("http://192.0.2.1/")


def test_nodes_that_do_not_answer_well_are_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs, fails, floods or talks nonsense costs the others nothing."""
    monkeypatch.setattr(utilization, "NODE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(utilization, "MAX_ANSWER_BYTES", 2_000_000)

    readings, failed = serve_and_read(
        {
            function.__name__: function
            for function in (
                *(well, hanging, failing, flooding, endless_line),
                *(nonsense, not_text, silent, elsewhere),
            )
        }
    )
    assert {name: reading.values for name, reading in readings.items()} == {"well": VALUES}
    assert failed.keys() == {
        *("hanging", "failing", "flooding", "endless_line", "nonsense", "not_text"),
        *("silent", "elsewhere", "no port"),
    }
    assert failed["hanging"] == "no answer within 0.5 s"
    assert "too long" in failed["flooding"]
    assert "too long" in failed["endless_line"]
