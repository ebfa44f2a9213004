"""Statuses come from a process of their own, which says why there is none, and is replaced."""

from __future__ import annotations

import contextlib
import sys

import pytest
import simulated_statuses as simulated
from ray_cluster import until
from simulated_statuses import PATH

from raywb.errors import NoClusterError, RaywbError
from raywb.view import status_feed
from raywb.view.status_feed import Answer, StatusFeed

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


def feed(*, asks: int = 3, ends: str = "raise SystemExit(7)", connect: str = "pass") -> StatusFeed:
    code = _CHILD.format(path=PATH, asks=asks, ends=ends, connect=connect)
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
