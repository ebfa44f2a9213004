"""Slurm's variables in the forms in which they come."""

from __future__ import annotations

import pytest

from raywb.nodes import slurm


def test_the_section_has_what_is_set() -> None:
    """Inside a job every known variable is told as it is written, and no other."""
    environment = {
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_NODELIST": "gpu[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_CPUS_ON_NODE": "16(x2)",
        "SLURM_MEM_PER_NODE": "65536",
        "SLURM_MEM_PER_CPU": "",
        "SLURM_GPUS_PER_NODE": "a100:4",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_PARTITION": "main",
        "SLURM_SUBMIT_DIR": "/home/me",
        "SUBMITIT_JOB_ID": "12345_0",
        "SLURM_CONF": "/etc/slurm.conf",
    }
    expected = {key.lower(): value for key, value in environment.items() if value}
    del expected["slurm_conf"]
    assert slurm.slurm_facts(environment) == expected


def test_outside_of_a_job_there_is_no_section() -> None:
    """Variables that somebody exported for later jobs do not make one."""
    assert slurm.slurm_facts({"SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": ""}) == {}
    assert slurm.slurm_facts({"SUBMITIT_JOB_ID": "7"}) == {"submitit_job_id": "7"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4", 4),
        ("0", 0),
        ("a100:4", 4),
        ("a100:2,v100:2", 4),
        ("gpu:a100:4", 4),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100:2(S:0,1),gpu:v100:1(S:1)", 3),
        (" 4 ", 4),
        ("", None),
        ("a100", None),
        ("a100:2,v100", None),
        ("-1", None),
        ("4.5", None),
        ("9" * 30, None),
    ],
)
def test_gpus_per_node(text: str, count: int | None) -> None:
    """Types add up; what names no number is no answer."""
    assert slurm.gpus_per_node({"SLURM_GPUS_PER_NODE": text}) == count
    assert slurm.gpus_per_node({}) is None


@pytest.mark.parametrize(
    ("text", "node", "count"),
    [
        ("16", None, 16),
        ("16(x2)", None, 16),
        ("72(x2),36", "1", 72),
        ("72(x2),36", "2", 36),
        ("72(x2),36", "9", 36),
        ("72(x999999),36", "100", 72),
        ("72,36", "odd", 72),
        ("0", None, None),
        ("", None, None),
        ("16(x", None, None),
        ("(x2)", None, None),
        ("many", None, None),
    ],
)
def test_cpus_on_node(text: str, node: str | None, count: int | None) -> None:
    """Of a list of nodes it is this one's part that counts."""
    environment = {"SLURM_CPUS_ON_NODE": text} | ({"SLURM_NODEID": node} if node else {})
    assert slurm.cpus_on_node(environment) == count


@pytest.mark.parametrize(("text", "count"), [("8", 8), ("0", None), ("", None), ("8x", None)])
def test_cpus_per_task(text: str, count: int | None) -> None:
    """A task has at least one CPU, or nobody said."""
    assert slurm.cpus_per_task({"SLURM_CPUS_PER_TASK": text}) == count


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4 * 2**30),
        ("4096M", 4 * 2**30),
        ("4G", 4 * 2**30),
        ("4g", 4 * 2**30),
        ("4GB", 4 * 2**30),
        ("2T", 2 * 2**40),
        ("1048576K", 2**30),
        ("0", None),
        ("0G", None),
        ("", None),
        ("lots", None),
        ("-1", None),
        ("4 G", None),
    ],
)
def test_memory(text: str, size: int | None) -> None:
    """A bare number is in megabytes; 0 means all of the node, which is no number."""
    assert slurm.mem_per_node_bytes({"SLURM_MEM_PER_NODE": text}) == size
    assert slurm.mem_per_cpu_bytes({"SLURM_MEM_PER_CPU": text}) == size
