"""`raywb watch` and `raywb status`: pictures of any status, on any output."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
import unicodedata

import msgspec
import pytest
import simulated_statuses as simulated
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from simulated_statuses import PATH

from raywb.cli import main
from raywb.reports import Status
from raywb.view.delivery import Pace
from raywb.view.drawing import Pen, bar, count, duration, middle_cut, number, plain, sparkline
from raywb.view.frame import frame_lines
from raywb.view.status_feed import Answer
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


@pytest.mark.parametrize("command", ["status", "watch"])
def test_an_address_that_is_none_is_said_to_be_so(command: str) -> None:
    """One sentence with Ray's reason, and the exit code of no cluster; no traceback."""
    ended = subprocess.run(
        [sys.executable, "-m", "raywb", "--address", "nonsense", command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PATH)},
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
    command = [sys.executable, "-c", _ONE_PICTURE.format(path=PATH)]
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
