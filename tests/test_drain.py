"""`raywb drain`: a machine's end is announced, and W&B's server has every row before it comes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ec2_metadata import Ec2Metadata
from left_behind import LeftBehind
from local_service import LocalService
from ray_cluster import RayCluster, clean_environment, until
from slurm import Slurm, missing_programs
from wandb_client import API_KEY
from wandb_server import WandbServer

from raywb import this_process
from raywb.launch.drain.on_signal import flush_on_signal
from raywb.launch.drain.spot_notice import MetadataUnreachable, SpotNotice


@pytest.fixture
def metadata() -> Iterator[Ec2Metadata]:
    with Ec2Metadata() as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as started:
        yield started


@pytest.fixture(scope="module")
def online(server: WandbServer) -> Iterator[RayCluster]:
    """A cluster whose runs go to the loopback server."""
    environment = {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": API_KEY,
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5",
    }
    with RayCluster.start(num_cpus=2, environment=environment) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if missing := missing_programs():
        text = f"no {', '.join(missing)} on this machine: apt-get install slurm-wlm munge"
        if os.environ.get("CI"):
            raise RuntimeError(text)
        pytest.skip(text)
    with Slurm.start() as started:
        yield started


#: A driver that logs until it is told to end, and a handler of its own that notes what it logged.
LOGGING = """
    import signal, threading
    import raywb
    from raywb.launch.drain.on_signal import flush_on_signal

    told = threading.Event()
    raywb.start(project="drain", run_id="{run_id}")
    signal.signal(signal.SIGTERM, lambda *_: told.set())  # Ray's own is there since it connected
    client = raywb.attach("s")
    print("attached", flush=True)
    logged = 0
    with flush_on_signal(signal.SIGTERM):
        while not told.wait(0.002):
            client.log({{"x": logged}}, step=logged)
            logged += 1
    with open("{noted}", "w") as noted:
        noted.write(str(logged))
"""


def values(server: WandbServer, run_id: str) -> tuple[str, list[Any]]:
    (run,) = [one for key, one in server.runs.items() if key.endswith(f"/{run_id}")]
    return run.state, run.values("s/x")


# -- the notices -----------------------------------------------------------------------------------


def test_the_notice_of_ec2(metadata: Ec2Metadata) -> None:
    """Nothing, then the action and its time; a token that has expired is fetched anew; where
    nobody answers, or something else does, that is said."""
    spot = SpotNotice(metadata.url)
    assert spot.look() is None
    assert spot.look() is None
    assert metadata.answers["PUT", "/latest/api/token", 200] == 1
    metadata.announce("terminate", 120)
    metadata.tokens.clear()
    assert spot.look() is None
    action, at_s = spot.look() or ("", 0.0)
    assert action == "terminate"
    assert abs(at_s - time.time() - 120) < 2
    metadata.notice = {"action": "terminate", "time": "soon"}
    with pytest.raises(MetadataUnreachable):
        spot.look()
    with pytest.raises(MetadataUnreachable):
        SpotNotice("http://127.0.0.1:9").look()


@pytest.mark.parametrize("then_signal", [True, False])
def test_a_signal_flushes_and_then_arrives(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, then_signal: bool
) -> None:
    """The rows are with the service when the program's own handler runs, which was not replaced;
    nothing is installed before or after the block."""
    service.up()
    service.start()
    client = service.client("s")
    monkeypatch.setattr(this_process, "_present", service._connections[0])
    received: list[tuple[int, int]] = []

    def own(_number: int, _frame: Any) -> None:
        stats = client.stats
        received.append((stats.logged, stats.backlog_bytes))

    before = signal.signal(signal.SIGUSR2, own)
    try:
        with flush_on_signal(signal.SIGUSR2, then_signal=then_signal):
            for number in range(500):
                client.log({"x": number}, step=number)
            os.kill(os.getpid(), signal.SIGUSR2)
            until("the rows", lambda: service.status().received_rows == 500, 20)
            if then_signal:
                until("the signal", lambda: received, 20)
        assert received == ([(500, 0)] if then_signal else [])
        assert signal.getsignal(signal.SIGUSR2) is own
    finally:
        signal.signal(signal.SIGUSR2, before)


# -- the drain -------------------------------------------------------------------------------------


def test_a_cluster_that_ended_first_is_drained_from_its_directory(tmp_path: Path) -> None:
    """The signal ended Ray, too: what it left on this machine is at W&B's server, and the run is
    failed, as one that was cut off; a machine with nothing to be found says so."""
    with WandbServer() as server, LeftBehind(tmp_path) as left:
        left.begin(mode="online", base_url=server.url, api_key=API_KEY)
        logged = left.kill()
        environment = clean_environment(tmp_path) | left.environment
        environment |= {"RAY_ADDRESS": "127.0.0.1:9", "WANDB_API_KEY": API_KEY}
        words = [sys.executable, "-m", "raywb", "drain", "--metadata-url="]
        nothing = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert nothing.returncode == 4, nothing.stderr
        assert "no directory of a service's is found" in nothing.stderr
        environment |= {"RAYWB_DIR": str(left.directory)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (run,) = server.runs.values()
        assert run.values("s/x")[:logged] == list(range(logged))
        assert run.state == "failed"


@pytest.mark.ray
def test_a_spot_instance_is_taken_away(
    online: RayCluster, server: WandbServer, metadata: Ec2Metadata, tmp_path: Path
) -> None:
    """EC2's metadata announce the end: all that was logged by then, and until the driver's end,
    is at W&B's server in time, in a run that is failed and can be opened again."""
    noted = tmp_path / "noted"
    driver = online.driver(LOGGING.format(noted=noted, run_id="spot"))
    watch = subprocess.Popen(
        [sys.executable, "-m", "raywb", "drain", "--watch", f"--metadata-url={metadata.url}"],
        env=online.environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        asked = ("GET", "/latest/meta-data/spot/instance-action", 404)
        until("the watch to ask", lambda: metadata.answers[asked], 60)
        until("rows at W&B", lambda: any("spot" in key for key in server.runs))
        metadata.announce("terminate", 45)
        began = time.monotonic()
        until("the drain", lambda: metadata.answers[(*asked[:2], 200)], 30)
        # The driver goes on for a while, as one that is not told by anybody.
        time.sleep(1.0)
        os.kill(driver.pid, signal.SIGTERM)
        driver.succeed()
        _, said = watch.communicate(timeout=100)
        print(said)
        assert watch.returncode == 0
        assert time.monotonic() - began < 45
        assert "EC2 announces: terminate: draining" in said
        assert values(server, "spot") == ("failed", list(range(int(noted.read_text()))))
    finally:
        watch.kill()
    online.run_driver("""
        import raywb
        raywb.start(project="drain", run_id="spot")
        raywb.attach("s").log({"x": -1}, step=-1)
        raywb.finish()
    """)
    state, rows = values(server, "spot")
    assert (state, rows[-1], len(rows)) == ("finished", -1, int(noted.read_text()) + 1)


@pytest.mark.ray
def test_a_slurm_job_is_preempted(online: RayCluster, server: WandbServer, slurm: Slurm) -> None:
    """SIGTERM to everything in the job, as at a preemption: the driver's own handler runs, and
    every row that it logged is at W&B's server when the job's drain ends."""
    work = slurm.root / "work"
    work.mkdir()
    noted = work / "noted"
    (work / "driver.py").write_text(
        textwrap.dedent(LOGGING.format(noted=noted, run_id="preempted"))
    )
    needed = ("PATH", "PYTHONPATH", "HOME", "RAY_", "WANDB_")
    exports = "\n".join(
        f"export {name}={shlex.quote(text)}"
        for name, text in online.environment.items()
        if name.startswith(needed)
    )
    python = shlex.quote(sys.executable)
    (work / "job.sh").write_text(f"""#!/bin/bash
#SBATCH --output={work}/output.log
{exports}
trap : TERM
{python} -m raywb drain --watch --metadata-url= --timeout-s=40 &
drain=$!
{python} {work}/driver.py &
wait $!
wait $drain
wait $drain
echo "drained: $?"
""")
    output = work / "output.log"

    def says(text: str) -> bool:
        return output.exists() and text in output.read_text()

    job = slurm.command("sbatch", "--parsable", str(work / "job.sh")).strip()
    until("the job to log", lambda: says("attached") and says("Waiting for the end"), 90)
    until("rows at W&B", lambda: any("preempted" in key for key in server.runs))
    slurm.command("scancel", "--full", "--signal=TERM", job)
    until("the drain", lambda: says("drained: "), 100)
    print(output.read_text())
    assert says("drained: 0")
    assert "SIGTERM: draining" in output.read_text()
    assert values(server, "preempted") == ("failed", list(range(int(noted.read_text()))))


def test_a_slurm_job_gives_its_nodes_back(slurm: Slurm, tmp_path: Path) -> None:
    """`raywb shutdown` in a job that would go on for long cancels that job, and no other."""
    environment = clean_environment(tmp_path)
    needed = ("PATH", "PYTHONPATH", "HOME", "RAY_")
    exports = "\n".join(
        f"export {name}={shlex.quote(text)}"
        for name, text in environment.items()
        if name.startswith(needed)
    )
    job = tmp_path / "job.sh"
    python = shlex.quote(sys.executable)
    job.write_text(f"""#!/bin/bash
#SBATCH --output={tmp_path}/output.log
{exports}
export RAY_ADDRESS=127.0.0.1:9
{python} -m raywb shutdown --place slurm --grace-s 0
sleep 600
""")
    other = slurm.command("sbatch", "--parsable", "--wrap=sleep 600").strip()
    number = slurm.command("sbatch", "--parsable", str(job)).strip()

    def state(one: str) -> str:
        return slurm.command("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={one}")

    until("the job's end", lambda: state(number).strip() == "CANCELLED", 60)
    assert state(other).strip() == "RUNNING"
    assert f"Slurm has accepted to cancel job {number}" in (tmp_path / "output.log").read_text()
