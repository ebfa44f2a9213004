"""How soon the page of a large run shows something, and what that takes."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import psutil

from raywb.reports import RunInfo
from raywb.service.outbox import Batch, Item, Outbox, OutDefine, OutRow, Range
from raywb.service.state import RunState, ServiceState, save_state
from tests.bench.table import Line

STAGES = 100
VALUES = 20


def make_run(directory: Path, rows: int, *, rows_per_batch: int) -> None:
    """A service's directory with one run: stages in turn, each with values and a step axis."""
    prefixes = [f"training/stage_{number:03d}/" for number in range(STAGES)]
    keys = [[f"{prefix}metric_{number:02d}" for number in range(VALUES)] for prefix in prefixes]
    outbox = Outbox(directory / "outbox")
    items: list[Item] = []
    for prefix in prefixes:
        items.append(OutDefine(1, prefix + "step", None, None))
        items.append(OutDefine(1, prefix + "*", prefix + "step", None, False))
    outbox.append(Batch(1, 0, [], items))
    for begin in range(0, rows, rows_per_batch):
        items = []
        for number in range(begin, min(begin + rows_per_batch, rows)):
            stage, step = number % STAGES, number // STAGES
            value = 1 / (1 + step)
            metrics: dict[str, Any] = {key: value + n for n, key in enumerate(keys[stage])}
            metrics[prefixes[stage] + "step"] = step
            items.append(OutRow(1, 1.7e9 + number / 100, metrics))
        consumed = [Range("a" * 32, begin, begin + len(items), len(items))]
        outbox.append(Batch(1, begin, consumed, items))
    outbox.close()
    info = RunInfo(project="bench", id="bench001", name="bench", mode="offline", dir=str(directory))
    run = RunState(number=1, info=info, settings={})
    save_state(directory, ServiceState(cluster_id="c" * 56, token="t", runs=[run]))


class _Page:
    """A page's server, and when it said what, in seconds since it was started."""

    def __init__(self, directory: Path) -> None:
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "raywb", "ui", str(directory), "--port", "0", "--no-open"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        while (match := re.search(r":(\d+)/", self.process.stdout.readline())) is None:
            pass
        self._connection = http.client.HTTPConnection("127.0.0.1", int(match[1]), timeout=60)

    def get(self, path: str) -> Any:
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return json.loads(body)

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def peak_rss_bytes(self, peak: list[int], done: threading.Event) -> None:
        """Watch the process that reads."""
        while not done.wait(0.02):
            for child in psutil.Process(self.process.pid).children():
                peak[0] = max(peak[0], child.memory_info().rss)

    def close(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(20) == 0


def _points_of(keys: list[str]) -> str:
    return "/api/points?run=1&points=600&" + urllib.parse.urlencode([("key", key) for key in keys])


def _open(directory: Path, rows: int, what: str, *, limit_s: float | None) -> list[Line]:
    page = _Page(directory)
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=page.peak_rss_bytes, args=(peak, done))
    watcher.start()
    try:
        page.get("/api/overview")
        overview_s = page.seconds()
        while len(series := page.get("/api/series?run=1")["series"]) < STAGES * (VALUES + 1):
            pass
        series_s = page.seconds()
        charts = [one["key"] for one in series if one["axis"]][:: STAGES * VALUES // 12][:12]
        first = page.get(_points_of(charts))
        charts_s = page.seconds()
        waits_s = []
        while (progress := page.get(_points_of(charts[:1])))["rows_read"] < rows:
            asked = page.seconds()
            page.get("/api/overview")
            waits_s.append(page.seconds() - asked)
            time.sleep(0.05)
        all_s = page.seconds()
        asked = page.seconds()
        last = page.get(_points_of(charts))
        whole_s = page.seconds() - asked
    finally:
        done.set()
        watcher.join()
        page.close()
    assert progress["rows_total"] == rows
    assert all(one["points"] == rows // STAGES for one in last["series"].values())
    rows_first = first["rows_read"]
    return [
        Line(
            f"the page of {what}",
            f"{charts_s:.2f} s to the first 12 charts",
            "wanted: at most 2 s" if limit_s else "",
            f"from the command's start: overview {overview_s:.2f} s, list of {len(series):,} "
            f"series {series_s:.2f} s, 12 charts of the first {rows_first:,} rows {charts_s:.2f} s,"
            f" all rows read {all_s:.2f} s; then 12 charts of all of them {whole_s * 1e3:.0f} ms",
            charts_s <= limit_s if limit_s else None,
        ),
        Line(
            "  while it reads, and its memory",
            f"{max(waits_s, default=0.0) * 1e3:.0f} ms, {peak[0] / 1e6:.0f} MB",
            "",
            "longest wait for an overview while rows are read; resident memory of the process that "
            "reads at its peak, with what it looks at of the files",
        ),
    ]


def measure(directory: Path, *, quick: bool) -> list[Line]:
    """Lines on a run of a million rows, as a busy service writes it, and row by row."""
    rows = 100_000 if quick else 1_000_000
    lines = []
    for rows_per_batch, how in ((200, "200 rows in a batch"), (1, "each row a batch")):
        place = directory / f"by-{rows_per_batch}"
        place.mkdir(parents=True)
        make_run(place, rows, rows_per_batch=rows_per_batch)
        what = f"a run of {rows:,} rows, {STAGES * VALUES:,} series and {STAGES} axes, {how}"
        lines += _open(place, rows, what, limit_s=2.0)
    return lines
