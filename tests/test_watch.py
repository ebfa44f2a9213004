"""`raywb watch`: pictures of any status, and a real service's in a real terminal."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import simulated_statuses as simulated
from click.testing import CliRunner
from ray_cluster import Driver, RayCluster, until
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from raywb.cli import main
from raywb.errors import NoClusterError, RaywbError
from raywb.reports import Status
from raywb.view import status_feed
from raywb.view.delivery import Pace
from raywb.view.drawing import Pen, bar, count, duration, middle_cut, number, plain, sparkline
from raywb.view.frame import frame_lines
from raywb.view.status_feed import Answer, StatusFeed
from raywb.view.terminal import render_status
from raywb.view.usage import usage_lines
from raywb.view.watch import Picture

SIZES = [(80, 24), (200, 50), (120, 35), (60, 15), (40, 10), (12, 5), (300, 100)]


def picture(status: Status, width: int = 80, height: int | None = 24, **more: object) -> list[str]:
    pen = Pen(width, simulated.NOW_S, ascii_only=bool(more.get("ascii_only")))
    return [line.plain for line in frame_lines(status, pen, height)]


def printed(status: Status, width: int = 80, now_s: float = simulated.NOW_S) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render_status(status, now_s))
    return console.export_text()


STATUSES = {
    "empty": simulated.empty(),
    "busy": simulated.busy(),
    "huge": simulated.huge(),
    "hostile": simulated.hostile(),
}


@pytest.mark.parametrize("name", STATUSES)
def test_no_picture_is_larger_than_its_terminal(name: str) -> None:
    """Whatever there is to show: no line is too wide, none too many, and nothing is obeyed."""
    for (width, height), ascii_only in itertools.product(SIZES, (False, True)):
        lines = picture(STATUSES[name], width, height, ascii_only=ascii_only)
        assert len(lines) <= height, (width, height)
        assert [line for line in lines if cell_len(line) > width] == [], (width, height)
        assert not [c for line in lines for c in line if unicodedata.category(c)[0] == "C"]
        if ascii_only and name != "hostile":
            assert "".join(lines).isascii()


def test_names_of_users_are_neither_markup_nor_commands() -> None:
    """What looks like markup is shown as it is; escape sequences and line ends are not."""
    for text in (
        "\n".join(picture(STATUSES["hostile"], 200, 50)),
        printed(STATUSES["hostile"], 200),
    ):
        assert "[red]x[/] [/nothing]" in text
        assert ":smile:" in text
        assert "訓練データ" in text
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "\u202e" not in text
    assert plain("a\r\nb\x1b[0m") == "a  b\ufffd[0m"


def test_everything_that_the_issue_names_is_there() -> None:
    """Run, group, mode, addresses; stages with queue and bottleneck; loss, rate, slowest rank; …"""
    text = "\n".join(picture(STATUSES["busy"], 120, 40))
    head = text.splitlines()[:2]
    for word in ("demo-run", "open", "online", "group slurm-12345", "SLURM_JOB_ID"):
        assert word in head[0]
    assert head[1].startswith("https://wandb.ai/some-team/demo/runs/k3j9x2ab")
    assert head[1].endswith("service 10.0.0.1:40123")
    (bottleneck,) = [line for line in text.splitlines() if "bottleneck" in line]
    assert re.match(r"▸ download_stage +━+╸?─+ +430 of 1,000 +12 → 3 +4 × 2.12 ", bottleneck)
    assert (
        "xenna  ━━━━━─── 61 % · 2 min 5 s · 570 inputs left (3.44/s) · 400 outputs (3.2/s)" in text
    )
    assert re.search(r"xenna/sft_2  done", text)
    assert re.search(
        r"training/pretrain +12,345 +loss +0\.\d+ +█\S+ +4/s +8 of 8 +rank 5 slow", text
    )
    assert re.search(r"validation/pretrain +12,000 +loss .* 20 s/step", text)
    assert re.search(r"^pretrain .* 1 h 6 min ago", text, re.M)
    assert re.search(r"^gpu-b .* 41 % .* stale 1 min 5 s", text, re.M)
    assert re.search(r"^head \(head\) .* 12 % ", text, re.M)
    assert "gone" not in text
    assert "3 nodes · 16 GPUs · 12% of the GPUs idle · 1 did not answer · 1 left" in text
    assert "98,765 rows in · 12,345 out · 55 waiting · merged to 12,400" in text
    assert "3 disk_full, 2 values rejected · 1 source unconfirmed (7+ rows)" in text
    assert "running · 12,345 rows shown by its server · 1 restart" in text
    assert "9 attached from 9 hosts · 1 silent, up to 1 min 35 s · 1 killed" in text
    assert "! W&B's server answered 403" in text
    assert "! training/pretrain: rank 5" in text
    # The most important of it is there at 80x24 as well.
    small = "\n".join(picture(STATUSES["busy"]))
    for word in ("bottleneck", "rank 5 slow", "0.344", "gpu-b", "stale", "55 waiting", "disk_full"):
        assert word in small


def test_very_many_are_summed_up() -> None:
    """1,000 nodes, sources and stages, 200 pipelines: the sums are right, and on one screen."""
    for width, height in ((80, 24), (200, 50)):
        lines = picture(STATUSES["huge"], width, height)
        text = "\n".join(lines)
        (many,) = re.findall(r"and (\d+) more, at least", text)
        assert int(many) + text.count("workers/worker_") == 1_000
        (many,) = re.findall(r"and (\d+) more: (?:\d+ running, )?\d+ done", text)
        assert int(many) + text.count("xenna/sft_") == 200
        assert "1,000 nodes · 8,000 GPUs · 3% of the GPUs idle · 4 did not answer" in text
        assert re.search(r"mean +━.* 43 % .* 60 % .* 81 % ", text)
        assert "1,000 attached from 100 hosts · 7 silent, up to 1 min" in text
        (alerts,) = re.findall(r"! (\d+) more", text)
        assert int(alerts) + text.count("! problem") == 60
    assert len(printed(STATUSES["huge"]).splitlines()) < 160


@pytest.mark.parametrize("all_nodes", [{}, {"gpu_idle_share": 0.5}], ids=["plain", "news"])
def test_every_node_is_shown_or_summed_up(all_nodes: dict[str, float]) -> None:
    """However many nodes and lines there are: all have a line of their own, or are counted."""
    for many, limit in itertools.product(range(1, 20), range(1, 24)):
        status = simulated.with_nodes(many, **all_nodes)
        lines = usage_lines(status, Pen(80, simulated.NOW_S), limit)
        drawn = [line.plain for line in lines]
        assert len(drawn) <= limit
        own = sum(re.match(r"n\d\d ", line) is not None for line in drawn)
        counted = re.search(rf"\b{many} nodes?\b", "\n".join(drawn))
        assert own == many or counted, (many, limit, drawn)
        if limit > many + 1:
            assert own == many
            assert counted
    assert "n14" in printed(simulated.with_nodes(15))


def test_readings_that_are_old_say_so() -> None:
    """No node answers any more: nothing newer calls the readings stale, their age marks them."""
    for many in (3, 40):
        status = simulated.with_nodes(many)
        for later_s, old in ((0.0, False), (40.0, False), (300.0, True)):
            lines = usage_lines(status, Pen(120, simulated.NOW_S + later_s), 12)
            text = "\n".join(line.plain for line in lines)
            assert ("last read 5 min 5 s ago" in text) == old
            own_lines = 3 if many == 3 else 7
            assert len(re.findall("5 min 5 s old$", text, re.M)) == (own_lines if old else 0)
            bars = {
                str(span.style)
                for line in lines
                for span in line.spans
                if "━" in line.plain[span.start : span.end]
            }
            assert bars == {"dim"} if old else "cyan" in bars
        assert "last read 5 min 5 s ago" in printed(status, now_s=simulated.NOW_S + 300)


def test_losses_come_before_nodes_and_no_line_is_left_over() -> None:
    """In a small terminal what is lost is said; a line that one part cannot use, another has."""
    for width, height in ((50, 12), (50, 9), (80, 12), (40, 8), (50, 7)):
        lines = picture(STATUSES["busy"], width, height)
        (lost,) = [line for line in lines if "3 disk_full" in line]
        assert "lost" in lost
    for name, height in itertools.product(("busy", "huge"), range(5, 40)):
        status = STATUSES[name]
        pen = Pen(80, simulated.NOW_S)
        whole = sum(bool(line) for line in frame_lines(status, pen, None))
        shown = frame_lines(status, pen, height, foot=Text("the last line"))
        assert shown[-2] or whole < height, (name, height)


def test_an_empty_run_says_what_to_do() -> None:
    """Nothing was logged yet: the way to do so is shown, in the place of empty tables."""
    text = "\n".join(picture(STATUSES["empty"]))
    assert 'client = raywb.attach("training"); client.log({"loss": 0.5}, step=1)' in text
    for title in ("pipelines", "stages", "nodes"):
        assert title not in text
    attached = simulated.empty(sources=[simulated.source(1)])
    assert "No rows yet" in "\n".join(picture(attached))


def test_the_pace_is_that_of_the_latest_statuses() -> None:
    """Rows per second come from successive statuses, and begin anew with another run."""
    pace, status = Pace(), simulated.busy()
    pace.note(status, 100.0)
    assert pace.rows_per_s() is None
    for n in range(1, 31):
        more = msgspec.structs.replace(
            status, received_rows=98_765 + n * n, outbox_rows=12_400 + 4 * n
        )
        pace.note(more, 100.0 + n)
    came, went = pace.rows_per_s() or (0, 0)
    assert came == pytest.approx((30**2 - 19**2) / 11, rel=0.1)
    assert went == pytest.approx(4.0)
    run = msgspec.structs.replace(status.run, id="another")
    pace.note(msgspec.structs.replace(status, run=run), 131.0)
    assert pace.rows_per_s() is None


def test_values_are_short_and_bars_are_right() -> None:
    """Numbers keep their meaning in a few characters; bars and curves keep their width."""
    assert [count(n) for n in (0, 1234, 9_999_999, 12_345_678, 3e13)] == [
        "0",
        "1,234",
        "9,999,999",
        "12.3M",
        "30.0T",
    ]
    assert [number(n) for n in (0.0, 2.3456789, 1234567.0, 1.2e-05, float("nan"))] == [
        "0.000",
        "2.346",
        "1.23e+06",
        "1.20e-05",
        "nan",
    ]
    assert [duration(s) for s in (0.4, 59.6, 125, 3600, 100_000)] == [
        "0 s",
        "1 min",
        "2 min 5 s",
        "1 h",
        "1 d 3 h",
    ]
    pen = Pen(80, 0.0)
    for share, drawn in ((0.0, "────"), (0.5, "━━──"), (0.6, "━━╸─"), (7.0, "━━━━")):
        assert bar(share, 4, pen).plain == drawn
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, pen).plain == "▁▂▃▄▅▆▇█"
    assert sparkline([float("nan"), 5.0, float("inf")], 5, pen).plain == "×▁×  "
    assert sparkline(list(range(1000)), 10, pen).plain == "▁▁▂▃▄▅▆▇██"[0:10]
    assert middle_cut("workers/worker_0001", 12, pen) == "worke…r_0001"
    assert cell_len(middle_cut("訓練データ訓練データ", 9, pen)) <= 9


def test_long_names_are_cut_in_no_time() -> None:
    """The middle of a name gives way in time that does not grow with its square; its end stays."""
    pen = Pen(80, 0.0)
    names = [f"{number:04}" + "訓練" * 490 + f"{number:04}" for number in range(20)]
    began = time.perf_counter()
    shown = [middle_cut(name, 20, pen) for name in names]
    assert time.perf_counter() - began < 0.5
    assert {(name[:5], name[-5:]) for name in shown} == {
        (f"{number:04}訓", f"練{number:04}") for number in range(20)
    }
    for width, text in itertools.product(
        range(1, 12), ("a訓b練c" * 3, "e\u0301" * 20, "👩\u200d🔧" * 5)
    ):
        assert cell_len(middle_cut(text, width, pen)) <= width


_CHILD = """
import sys, time
sys.path[:0] = {path!r}
import simulated_statuses
from raywb.errors import NoClusterError
from raywb.view.status_feed import serve_statuses
asked = 0
def ask(timeout_s):
    global asked
    asked += 1
    print("Ray says something")
    if asked == {asks}:
        {ends}
    return simulated_statuses.huge()
def connect():
    {connect}
serve_statuses(connect, ask, 0.05)
"""


#: Where the test's own modules and raywb are.
_PATH = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def feed(*, asks: int = 3, ends: str = "raise SystemExit(7)", connect: str = "pass") -> StatusFeed:
    code = _CHILD.format(path=_PATH, asks=asks, ends=ends, connect=connect)
    return StatusFeed([sys.executable, "-c", code])


def test_a_feed_whose_process_ends_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that talks to Ray may die with its cluster: the next one is started."""
    monkeypatch.setattr(status_feed, "RESTART_PAUSE_S", 0.1)
    with contextlib.closing(feed()) as source:
        answers: list[Answer] = []

        def ended() -> bool:
            if (answer := source.poll()) is not None:
                answers.append(answer)
            return sum(one.trouble is not None for one in answers) >= 1

        until("the end of the first child", ended)
        assert [one.status for one in answers[:-1]] == [simulated.huge()] * (len(answers) - 1)
        assert answers[-1].trouble == "the connection to the Ray cluster is lost"
        before = len(answers)
        until("another child's answer", lambda: ended() and len(answers) > before)
        assert answers[before].status == simulated.huge()
    fails = 'raise NoClusterError("there is no Ray cluster")'
    with contextlib.closing(feed(connect=fails)) as source:
        answer = until("the trouble", source.poll)
        with pytest.raises(NoClusterError, match="there is no Ray cluster"):
            answer.raise_trouble()


def test_a_feed_says_why_there_is_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever connecting or asking raises is told; what never was is not called lost."""
    monkeypatch.setattr(status_feed, "RESTART_PAUSE_S", 0.1)
    mismatch = 'raise RuntimeError("Version mismatch:\\n  Ray: 2.1")'
    with contextlib.closing(feed(connect=mismatch)) as source:
        found = until("the trouble", source.poll)
        with pytest.raises(RaywbError, match=r"RuntimeError: Version mismatch: Ray: 2\.1"):
            found.raise_trouble()
        # The end of the child comes after its last word, and does not gainsay it.
        assert until("another child's trouble", source.poll) == found
    with contextlib.closing(feed(asks=1, ends='raise KeyError("odd")')) as source:
        assert until("the trouble", source.poll).trouble == "KeyError: 'odd'"
    with contextlib.closing(feed(asks=1)) as source:
        told = until("the end", source.poll).trouble
        assert told is not None
        assert "has ended (exit code 7) before it had an answer" in told
        assert "lost" not in told


@pytest.mark.parametrize("command", ["status", "watch"])
def test_an_address_that_is_none_is_said_to_be_so(command: str) -> None:
    """One sentence with Ray's reason, and the exit code of no cluster; no traceback."""
    ended = subprocess.run(
        [sys.executable, "-m", "raywb", "--address", "nonsense", command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_PATH)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 3, ended.stderr
    assert "cannot connect to a Ray cluster at 'nonsense': Invalid address" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_another_version_of_ray_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a RuntimeError of several lines then: the command says what is in it."""

    def refuse(**_settings: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1")

    monkeypatch.setattr("ray.init", refuse)
    ended = CliRunner().invoke(main, ["status"])
    assert ended.exit_code == 3
    assert "Version mismatch: The cluster was started with: Ray: 2.1" in ended.output


_ONE_PICTURE = """
import sys
sys.path[:0] = {path!r}
import simulated_statuses, raywb.lifecycle
from rich.console import Console
from raywb.view.terminal import render_status
from raywb.view.watch import watch_command
for status in (simulated_statuses.busy(), simulated_statuses.hostile()):
    raywb.lifecycle.status = lambda **_: status
    Console().print(render_status(status, simulated_statuses.NOW_S))
    watch_command("auto", lambda: None, 2.0, feed=False)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_without_unicode_is_no_trouble(encoding: str) -> None:
    """`raywb status` and `raywb watch` print any name with the characters that the output has."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    command = [sys.executable, "-c", _ONE_PICTURE.format(path=_PATH)]
    ended = subprocess.run(
        command, env=environment, capture_output=True, timeout=60, check=False, text=False
    )
    assert ended.returncode == 0, ended.stderr.decode()
    text = ended.stdout.decode(encoding)
    assert text.count("demo-run") == 2
    assert text.count("[red]x[/] [/nothing]") > 10
    assert ":smile: ???????????" in text  # a sign that no terminal obeys, and five wide ones
    assert "the output is no terminal" in ended.stderr.decode()


def test_a_picture_says_that_it_is_old() -> None:
    """An answer that does not come, or none at all: the last status stays, with its age."""
    watched = Picture(2.0)

    def text(now_s: float) -> str:
        return "\n".join(line.plain for line in watched.lines(120, 40, now_s, ascii_only=False))

    watched.take(Answer(status=simulated.busy()), 1000.0, 50.0)
    assert "no answer" not in text(1003.0)
    assert re.search(
        r"! no answer since \d\d:\d\d:\d\d, this is 5 s old; still asking", text(1005.0)
    )
    watched.take(
        Answer(trouble="the service is gone: [x]", kind="ServiceUnavailable"), 1006.0, 56.0
    )
    assert "this is 1 min 30 s old; still asking (the service is gone: [x])" in text(1090.0)
    assert "430 of 1,000" in text(1090.0)
    watched.take(Answer(status=simulated.busy(received_rows=98_865)), 1100.0, 150.0)
    assert "no answer" not in text(1100.0)
    assert "98,865 rows in (1.0/s)" in text(1100.0)


def test_a_clock_that_is_set_back_changes_no_pace() -> None:
    """Rows per second are taken on a clock that never goes back, whatever the time of day does."""
    watched = Picture(2.0)
    for now_s, steady_s, rows in ((1000.0, 50.0, 0), (400.0, 60.0, 500)):
        status = simulated.busy(received_rows=98_765 + rows)
        watched.take(Answer(status=status), now_s, steady_s)
    text = "\n".join(line.plain for line in watched.lines(120, 40, 400.0, ascii_only=False))
    assert "99,265 rows in (50/s)" in text


class Terminals:
    """Real terminals, of a tmux of their own."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._socket = str(directory / "tmux")
        self._environment = {**environment, "LANG": "C.UTF-8", "TERM": "xterm-256color"}

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-u", "-f", os.devnull, "-S", self._socket, *arguments]
        return subprocess.run(
            command, env=self._environment, check=True, capture_output=True, text=True, timeout=20
        ).stdout

    def open(self, name: str, width: int, height: int, command: str) -> None:
        """Run a command in a terminal; afterwards it shows its exit code."""
        shown = f"trap : INT; {command}; echo exit $?; sleep 1000"
        size = ("-x", str(width), "-y", str(height))
        self._tmux("new-session", "-d", "-s", name, *size, "sh", "-c", shown)

    def screen(self, name: str) -> str:
        return self._tmux("capture-pane", "-p", "-t", name)

    def press(self, name: str, *keys: str) -> None:
        self._tmux("send-keys", "-t", name, *keys)

    def settings(self, name: str) -> str:
        """Whether the alternate screen is shown, and whether the cursor is: two digits."""
        return self._tmux("display", "-p", "-t", name, "#{alternate_on}#{cursor_flag}").strip()

    def until(self, name: str, pattern: str, timeout_s: float = 60.0) -> str:
        """Wait until the screen shows something; returns the screen."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, screen := self.screen(name), re.M):
            assert time.monotonic() < deadline, f"no {pattern!r} in\n{screen}"
            time.sleep(0.1)
        return screen

    def close(self) -> None:
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], check=False, timeout=20)


@pytest.fixture
def terminals(cluster: RayCluster) -> Iterator[Terminals]:
    with real_terminals(cluster.environment) as found:
        yield found


@pytest.fixture
def bare_terminals() -> Iterator[Terminals]:
    with real_terminals({**os.environ, "PYTHONPATH": os.pathsep.join(_PATH)}) as found:
        yield found


@contextlib.contextmanager
def real_terminals(environment: dict[str, str]) -> Iterator[Terminals]:
    if shutil.which("tmux") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("tmux is not installed: apt-get install tmux")
        pytest.skip("tmux is not installed")
    directory = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))
    found = Terminals(directory, environment)
    try:
        yield found
    finally:
        found.close()
        shutil.rmtree(directory, ignore_errors=True)


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
        script.write_text(_WATCH.replace("{path!r}", repr(_PATH)).replace("{status}", status))
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
