"""A person sees what the recipe says and nothing else; what else is said lies in the log."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

from recipes.stages.receipts import Totals
from recipes.summary import rows_in_words
from recipes.terminal import Terminal

NOISY = """
import os, subprocess, sys, threading
from pathlib import Path
from recipes.terminal import quiet_terminal

seen = threading.Event()
def snapshot():
    seen.set()
    return [("plan_stage", 3, 4), ("download_stage", 1, None)]

print("before", flush=True)
with quiet_terminal(Path(sys.argv[1])) as terminal:
    terminal.step("a step with [brackets]")
    print("noise of Python")
    os.write(2, b"noise of C\\n")
    subprocess.run(["echo", "noise of a child"])
    with terminal.progress(snapshot):
        assert not sys.argv[2:] or seen.wait(30)
    terminal.result("the result, " + "long " * 40)
    terminal.error("an error")
print("after")
"""


def test_noise_goes_to_the_log_and_nothing_else_does(tmp_path: Path) -> None:
    """Output of Python, C and child processes lies in the log; the recipe's own does not."""
    log = tmp_path / "noise.log"
    shown = subprocess.run(
        [sys.executable, "-c", NOISY, str(log)], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "before\nthe result, " + "long " * 40 + "\nafter\n"
    assert shown.stderr == "a step with [brackets]\nan error\n"
    assert sorted(log.read_text().splitlines()) == [
        "noise of C",
        "noise of Python",
        "noise of a child",
    ]


def test_without_a_terminal_progress_is_a_plain_line_now_and_then() -> None:
    """Written into a file, progress is a line when it changed, without escape codes."""
    err = io.StringIO()
    states = iter([None, [("plan", 1, 4)], [("plan", 1, 4)], [("plan", 4, 4), ("fetch", 0, None)]])
    done = threading.Event()

    def snapshot() -> list[tuple[str, int, int | None]] | None:
        state = next(states, None)
        if state is None and err.getvalue():
            done.set()
        return state

    with Terminal(io.StringIO(), err, plain_line_s=0).progress(snapshot):
        assert done.wait(30)
    assert err.getvalue() == "plan 1/4\nplan 4/4, fetch 0/?\n"


def test_a_terminal_shows_a_bar_per_stage(tmp_path: Path) -> None:
    """On a terminal each stage has its bar, with the tasks that are done and expected."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", NOISY, str(tmp_path / "log"), "wait"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # the other side was closed
            pass
        assert process.wait() == 0
    os.close(ours)
    assert b"plan_stage" in shown
    assert b"3/4" in shown
    assert b"1/?" in shown
    assert b"noise" not in shown


def test_the_summary_says_where_every_row_went() -> None:
    """Rows in, kept, filtered and errors, the latter two by kind."""
    totals = Totals(2, 1_205, 1_200, {"empty": 3}, {"broken_json": 1, "undecodable": 1}, 9, 9)
    assert rows_in_words(totals) == (
        "1,205 in = 1,200 kept + 3 filtered (empty 3) + 2 errors (broken_json 1, undecodable 1)"
    )
    assert rows_in_words(Totals(0, 0, 0, {}, {}, 0, 0)) == "0 in = 0 kept + 0 filtered + 0 errors"
