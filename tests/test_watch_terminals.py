"""`raywb watch` in real terminals: stopped and gone on with, and over a whole run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray_cluster import Driver, RayCluster
from rich.cells import cell_len
from simulated_statuses import PATH
from terminals import Terminals, real_terminals


@pytest.fixture
def terminals(cluster: RayCluster) -> Iterator[Terminals]:
    with real_terminals(cluster.environment) as found:
        yield found


@pytest.fixture
def bare_terminals() -> Iterator[Terminals]:
    with real_terminals({**os.environ, "PYTHONPATH": os.pathsep.join(PATH)}) as found:
        yield found


_WATCH = """
import sys
sys.path[:0] = {path!r}
import raywb.lifecycle, simulated_statuses
from rich.console import Console
from raywb.view.status_feed import StatusFeed
from raywb.view.watch import watch, watch_command
if Console().is_dumb_terminal:
    raywb.lifecycle.status = lambda **_: simulated_statuses.busy()
    watch_command("auto", lambda: None, 2.0, feed=False)
    sys.exit()
child = '''
import sys, time
sys.path[:0] = {path!r}
import simulated_statuses
from raywb.view.status_feed import serve_statuses
serve_statuses(lambda: time.sleep(0.5), lambda _: simulated_statuses.{status}(), 0.2)
'''
watch(StatusFeed([sys.executable, "-c", child]), Console(), 0.2)
"""


@pytest.fixture
def watching(tmp_path: Path) -> Callable[[str], str]:
    """Makes the command that watches a simulated status."""

    def command(status: str) -> str:
        script = tmp_path / f"{status}.py"
        script.write_text(_WATCH.replace("{path!r}", repr(PATH)).replace("{status}", status))
        return shlex.join([sys.executable, str(script)])

    return command


def test_a_watch_stops_and_goes_on(
    bare_terminals: Terminals, watching: Callable[[str], str]
) -> None:
    """Ctrl-Z gives the terminal back as it was, `fg` draws again, and q still ends it."""
    bare_terminals.open("shell", 80, 24, "env PS1='shell> ' bash --norc --noprofile -i")
    bare_terminals.until("shell", r"^shell>")
    before = bare_terminals.settings("shell")
    assert before == "01"
    bare_terminals.press("shell", watching("busy"), "Enter")
    bare_terminals.until("shell", r"asking the service")
    for _ in range(2):  # once before there is a picture, as it may be, and once with one
        bare_terminals.press("shell", "C-z")
        bare_terminals.until("shell", r"Stopped")
        assert bare_terminals.settings("shell") == before
        bare_terminals.press("shell", "clear; fg", "Enter")
        screen = bare_terminals.until("shell", r"^q quits")
        assert bare_terminals.settings("shell") == "10"
        assert "demo-run" in screen
    bare_terminals.press("shell", "q")
    screen = bare_terminals.until("shell", r"^shell>$")
    assert bare_terminals.settings("shell") == before
    assert "delivery" not in screen


def test_terminals_that_lack_something(
    bare_terminals: Terminals, watching: Callable[[str], str]
) -> None:
    """No keyboard, no Unicode, no cursor: there is a picture all the same, and it says so."""
    hostile, busy = watching("hostile"), watching("busy")
    bare_terminals.open("deaf", 80, 24, f"{busy} <&-")
    bare_terminals.open("latin", 80, 24, f"PYTHONIOENCODING=latin-1 {hostile}")
    bare_terminals.open("dumb", 80, 60, f"TERM=dumb {busy}")
    screen = bare_terminals.until("deaf", r"^Ctrl-C quits")
    assert "q quits" not in screen
    bare_terminals.press("deaf", "C-c")
    bare_terminals.until("deaf", r"^exit 0")
    screen = bare_terminals.until("latin", r"^q quits")
    assert "[red]x[/] [/nothing]" in screen
    bare_terminals.press("latin", "q")
    bare_terminals.until("latin", r"^exit 0")
    screen = bare_terminals.until("dumb", r"^exit 0")
    assert "demo-run" in screen
    assert "this is no terminal" not in screen
    assert "TERM says that nothing can be drawn anew" in " ".join(screen.split())


#: A service with what two recipes would log: a pipeline half done, one failed, ranks that train.
SCRIPT = """
import time, raywb
from ray_cluster import report, told
info = raywb.start(project="demo", name="watched [bold]run", group="slurm-7", mode="offline",
                   node_metrics_interval_s=1.0)
first = raywb.attach("training/pretrain", rank=0, world_size=2)
second = raywb.attach("training/pretrain", rank=1, world_size=2)
for step in range(40):
    for client in (first, second):
        client.log({"loss": 4.0 - step / 20, "lr": 0.001}, step=step)
notes = raywb.attach("eval")
notes.log({"accuracy": 0.875})

def snapshot(done, **more):
    row = {"pipeline_duration_s": 75.0, "main_loop_rate_hz": 9.0}
    for name, completed, queue in (("plan_stage", 200, 0), ("download_stage", done, 17)):
        stage = {"actors_ready": 3, "actors_pending": 1, "tasks_completed": completed,
                 "queue_in": queue, "queue_out": 4 if queue == 0 else 0, "slots_used": 3,
                 "slots_empty": 0, "speed_tasks_per_s": 1.5, "resource/cpu_util_pct": 88.0,
                 "resource/mem_gb": 2.5}
        row |= {f"stage/{name}/{key}": value for key, value in stage.items()}
    return row | {"progress": 60.0, "num_input_remaining": 0, "num_outputs": done,
                  "inputs_processed_per_s": 2.75, "outputs_per_s": 1.25,
                  "bottleneck_stage_index": 1} | more

series = [notes.open_series("xenna", label="sft", axis="pipeline_duration_s") for _ in range(2)]
series[0].log(snapshot(90))
series[1].log(snapshot(5, error_type="ValueError", error_message="three is [bad]"))
for client in (first, second, notes):
    assert client.flush(30)
while raywb.status().received_rows < 83 or not raywb.status().live.nodes:
    time.sleep(0.1)
report([info.id, info.dir])
told()
for step in range(40, 50):
    for client in (first, second):
        client.log({"loss": 2.0, "lr": 0.001}, step=step)
for client in (first, second):
    assert client.flush(30)
report(None)
told()
raywb.finish(timeout_s=60)
report(None)
told()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with RayCluster.start(num_cpus=2) as started:
        yield started


def check_numbers(screen: str, width: int, height: int) -> None:
    lines = screen.splitlines()
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    assert re.match(r"raywb  watched \[bold\]run · open · offline · group slurm-7", lines[0])
    assert re.match(r"/.*service [\w.]+:\d+$", lines[1])
    assert re.search(r"^xenna  ━━━━━─── 60 % · 1 min 15 s · 0 inputs left", screen, re.M)
    assert re.search(r"^ +plan_stage +━+╸?─* +200 of 203 +0 → 4 +3\+1 × 1\.5", screen, re.M)
    bottleneck = r"^▸ download_stage +━+╸?─+ +90 of 114 +17 → 0 +3\+1 × 1\.5.* bottleneck"
    assert re.search(bottleneck, screen, re.M)
    assert re.search(r"^xenna/sft_2  failed · ValueError: three is \[bad\]", screen, re.M)
    assert re.search(r"^training/pretrain +39 +loss +2\.050 +█[▁-█]+▁ ", screen, re.M)
    assert re.search(r"^eval +accuracy +0\.875", screen, re.M)
    assert re.search(r"^\S+ \(head\) +[━╸─]+ +\d+ % +[━╸─]+ +\d+ %", screen, re.M)
    assert "83 rows in" in screen
    assert re.search(r"lost +none", screen)
    assert re.search(r"sources +1 attached", screen)


def piped(cluster: RayCluster, *words: str) -> subprocess.Popen[str]:
    """A command whose output goes to a program."""
    command = [sys.executable, "-m", "raywb", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=cluster.environment, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.ray
def test_a_run_is_watched_in_real_terminals(cluster: RayCluster, terminals: Terminals) -> None:
    """80x24 and 200x50 over a whole run: its numbers, a service that restarts, a good end."""
    watch = f"{shlex.quote(sys.executable)} -m raywb watch --interval-s 0.5"
    terminals.open("early", 80, 24, watch)
    driver: Driver = cluster.driver(textwrap.dedent(SCRIPT))
    early = terminals.until("early", r"^exit \d+|raywb  watched")
    driver.next_report()
    print(early)
    if "exit" in early:  # unless the service came up first, it said what to do
        assert "exit 4" in early
        assert "raywb.start()" in " ".join(early.split())
    for name, width, height in (("small", 80, 24), ("large", 200, 50)):
        terminals.open(name, width, height, watch)
    once, status = (piped(cluster, *words) for words in (("watch",), ("status", "--json")))
    for name, width, height in (("small", 80, 24), ("large", 200, 50)):
        screen = terminals.until(name, r"out \([\d.]+/s\)")
        print(screen)
        check_numbers(screen, width, height)
    text, said = once.communicate(timeout=60)
    check_numbers(text, 80, 60)
    assert "`raywb status --json` is for programs" in said
    live = json.loads(status.communicate(timeout=60)[0])["live"]
    assert [one["name"] for one in live["pipelines"]] == ["xenna", "xenna/sft_2"]
    assert {one["stage"]: one["metrics"] for one in live["stages"]} == {
        "eval": {"accuracy": 0.875},
        "training/pretrain": {"loss": pytest.approx(2.05), "lr": 0.001},
    }

    service = cluster.service()
    assert service is not None
    service.kill()
    print(terminals.until("small", r"^! no answer since \d|, start 2$", 30))
    terminals.until("small", r"start 2")
    screen = terminals.until("large", r"start 2")
    assert re.search(r"^training/pretrain +39 +loss +2\.050 +█[▁-█]+▁ ", screen, re.M)
    driver.tell()
    driver.next_report()
    terminals.until("small", r"^training/pretrain +49 ")
    assert "103 rows in" in terminals.until("large", r"103 rows in")

    driver.tell()
    driver.next_report()
    terminals.until("large", r"· finished · offline")
    terminals.press("small", "q")
    terminals.press("large", "C-c")
    for name in ("small", "large"):
        screen = terminals.until(name, r"^exit \d+", 10)
        assert "exit 0" in screen
        assert "Traceback" not in screen
        assert "delivery" not in screen, "the terminal is as it was before"
    driver.tell()
