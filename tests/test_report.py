"""`raywb report`: one file that opens anywhere, with what the outbox holds, and PNGs beside it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from browser import Tab, chromium
from click.testing import CliRunner, Result
from local_service import LocalService, local_service

from raywb.cli import EXIT_DIRECTORY, main
from raywb.service.outbox import Cursor, Outbox, OutRow
from raywb.service.state import load_left_state, save_state
from raywb.view.report import pictures
from raywb.view.report.contents import MOST_POINTS, MOST_SERIES, collect

STEPS = 1_500

#: Names that would end a script, begin one, or be a formula for matplotlib.
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(2)>",
    "$\\frac{$",
    "line\u2028end\u2029",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of an offline run that has everything a report shows."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYWB_JOURNAL_DIR", str(root / "journals"))
        with local_service(root) as service:
            service.up()
            service.start(project="robots", name="sky/1 </title>")
            log_everything(service)
            assert service.service is not None
            assert service.service.finish(30.0, 0).complete
        yield service.directory


def log_everything(service: LocalService) -> None:
    clients = {stage: service.client(stage) for stage in ("training/a", "nodes", None)}
    training = clients["training/a"]
    for step in range(STEPS):
        training.log({"loss": 5 * math.exp(-step / 300), "spike": float(step == 777)}, step=step)
        if step % 100 == 50:
            training.log({"valid/accuracy": step / STEPS}, step=step)
    pipeline = clients[None].open_series("xenna", label="mine", axis="pipeline_duration_s")
    of_a_stage = ("tasks_completed", "queue_in", "queue_out", "slots_used", "slots_empty")
    of_a_stage += ("actors_ready", "actors_pending", "speed_tasks_per_s")
    for second in (number + 0.1234567 for number in range(20)):
        row = {"pipeline_duration_s": second, "progress": 5.0 * second, "outputs_per_s": 2.0}
        row |= {"num_input_remaining": 9, "num_outputs": 5, "main_loop_rate_hz": 9.5}
        pipeline.log(row | {f"stage/plan_stage/{key}": int(second) for key in of_a_stage})
    nodes = clients["nodes"]
    nodes.define_metric("*", step_metric="time_s")
    for second in range(0, 150, 15):
        hosts = {f"host-{n}/cpu_percent": 10.0 * n + second / 3 for n in range(3)}
        nodes.log({"time_s": second, "alive": 3, "answered": 3} | hosts)
    for key in HOSTILE:
        clients[None].log({key: 1.0})
        clients[None].log({key: 2.0})
    for client in clients.values():
        assert client.flush(20.0)


def rows_of(directory: Path, run: int = 1) -> list[OutRow]:
    """The rows of a run as the outbox itself gives them."""
    outbox = Outbox(directory / "outbox", read_only=True)
    cursor, rows = Cursor(run, 0, 0, 0), []
    while items := outbox.read(cursor, 1_000):
        rows += [item for _, item in items if isinstance(item, OutRow)]
    return rows


def write_report(directory: Path, *arguments: Any, code: int = 0) -> Result:
    """The command, in this process."""
    done = CliRunner().invoke(main, ["report", str(directory), *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done


def data_of(path: Path) -> dict[str, Any]:
    """What a report's page finds in it."""
    found = re.search(
        r'id="raywb-data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def number_of(text: str) -> float:
    """A number as the page writes it, as a number again."""
    return float(text.replace("−", "-").replace(",", ""))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def open_report(browser: Any, path: Path, view: str) -> Tab:
    """A view of the file in a tab."""
    tab = Tab(browser, f"file://{path}")
    tab.page.on("dialog", lambda dialog: tab.errors.append(f"dialog {dialog.message}"))
    tab.show(view)
    return tab


def readout(tab: Tab, key: str) -> str:
    """The value that is shown beside a chart's title."""
    found = tab.page.locator(f'raywb-chart:has(.title[title="{key}"]) .readout b')
    tab.page.wait_for_function("e => e.textContent.trim() !== ''", arg=found.element_handle())
    return str(found.inner_text())


def test_the_file_shows_what_the_outbox_holds(finished: Path, browser: Any, tmp_path: Path) -> None:
    """Every value of every series is in the file, and the page shows it, without any network."""
    path = tmp_path / "report.html"
    done = write_report(finished, "--output", path, "--points", 20_000)
    assert str(path) in done.output
    assert "with all their points" in done.output
    rows = rows_of(finished)
    points = data_of(path)["points"]["1"]
    wanted: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.metrics.items():
            if isinstance(value, (int, float)):
                wanted.setdefault(key, []).append(float(value))
    assert {"training/a/loss", "xenna/progress", "nodes/host-2/cpu_percent"} <= wanted.keys()
    assert points.keys() == wanted.keys()
    for key, values in wanted.items():
        assert sorted(points[key]["mean"]) == pytest.approx(sorted(values), rel=1e-8), key
        assert points[key]["min"] == points[key]["mean"] == points[key]["max"]
    assert points["training/a/loss"]["axis"] == "training/a/step"
    assert points["training/a/loss"]["x"] == list(range(STEPS))
    assert points["xenna/progress"]["x"] == wanted["xenna/pipeline_duration_s"]

    tab = open_report(browser, path, "training")
    shown = readout(tab, "training/a/loss")
    assert number_of(shown) == pytest.approx(wanted["training/a/loss"][-1], rel=1e-3)
    about = tab.page.locator("#report").inner_text()
    assert about.startswith("Report of sky/1 </title>, written ")
    tab.show("delivery").get_by_text(f"{len(rows):,}").first.wait_for()
    tab.show("pipelines").get_by_text("19 of 66 tasks").first.wait_for()
    tab.show("nodes").get_by_text("host-2").first.wait_for()
    assert (tab.foreign_requests, tab.errors) == ([], [])
    tab.close()


def test_hostile_names_do_nothing(finished: Path, browser: Any, tmp_path: Path) -> None:
    """Keys that would end or begin a script are shown as they are, and their values with them."""
    path = tmp_path / "hostile.html"
    write_report(finished, "--output", path)
    text = path.read_text(encoding="utf-8")
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 3
    assert text.count("</title>") == 1
    assert "\u2028" not in text
    tab = open_report(browser, path, "training")
    for key in HOSTILE[:4]:
        quoted = key.replace("\\", "\\\\").replace('"', '\\"')
        tab.page.locator(f'.title[title="{quoted}"]').wait_for()
    tab.show("overview").get_by_role("heading", name="sky/1 </title>").wait_for()
    assert tab.page.evaluate("document.querySelectorAll('img').length") == 0
    tried = "fetch('data:,x').then(() => 'went', () => 'refused')"
    assert tab.page.evaluate(tried) == "refused"
    assert [said for said in tab.errors if "Content Security Policy" not in said] == []
    assert tab.foreign_requests == []
    tab.close()


def test_pictures_are_drawn(finished: Path, tmp_path: Path) -> None:
    """A PNG for each stage, pipeline, heat map and the delivery, each with something on it."""
    image = pytest.importorskip("matplotlib.image")
    directory = tmp_path / "pictures"
    done = write_report(finished, "--output", tmp_path / "r.html", "--png", directory)
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        *("training-a.png", "pipeline_xenna.png", "nodes_cpu_percent.png", "delivery.png"),
        *("script-script-alert-1.png", "series.png"),
    }
    assert f"{len(names)} PNGs" in done.output
    for path in directory.iterdir():
        pixels = image.imread(path)
        height, width = pixels.shape[:2]
        assert width == 1408, path
        assert 250 < height < 2_000, path
        drawn = (pixels[80:, :, :3].min(axis=2) < 0.95).mean()
        assert 0.01 < drawn < 0.98, path
    # A second report takes the place of the first, and of nothing else.
    before = (directory / "pipeline_xenna.png").stat().st_mtime_ns
    (directory / "training-a.png").write_bytes(b"somebody's own")
    done = write_report(finished, "--output", tmp_path / "r.html", "--png", directory, code=1)
    assert (directory / "pipeline_xenna.png").stat().st_mtime_ns > before
    assert "no picture of raywb's" in done.output
    assert (directory / "training-a.png").read_bytes() == b"somebody's own"


def test_pictures_without_matplotlib(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written all the same, and the message names the extra."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "r.html"
    done = write_report(finished, "--output", path, "--png", tmp_path / "pictures", code=1)
    assert "pip install 'raywb[report]'" in done.output
    assert path.exists()
    assert not (tmp_path / "pictures").exists()


def test_what_is_replaced(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default name is the run's; an earlier report is replaced, any other file is not."""
    monkeypatch.chdir(tmp_path)
    write_report(finished)
    (path,) = tmp_path.iterdir()
    assert path.name == "sky-1-title.html"
    before = path.stat().st_ino
    write_report(finished)
    assert path.stat().st_ino != before
    path.write_text("<!doctype html><p>mine")
    done = write_report(finished, code=1)
    assert "no report of raywb's" in done.output
    assert path.read_text() == "<!doctype html><p>mine"
    done = write_report(finished, "--output", tmp_path / "none" / "r.html", code=1)
    assert "cannot be written" in done.output
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    """A service whose run nobody finishes, with W&B left out."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path / "project") as service:
        service.up()
        service.start(mode="disabled", project="robots", name="left")
        yield service


def log_rows(service: LocalService, rows: int) -> None:
    client = service.client("s")
    for step in range(rows):
        client.log({"x": float(step)}, step=step)
    assert client.flush(20.0)
    service.wait_for(lambda status: status.outbox_rows >= rows)


def test_a_run_at_work_and_one_that_was_left(left: LocalService, tmp_path: Path) -> None:
    """No rows, a live service, a run that nobody finished: each is said, in the file and here."""
    path = tmp_path / "r.html"
    done = write_report(left.directory, "--output", path)
    assert "There are no rows yet." in done.output
    log_rows(left, 100)
    done = write_report(left.directory, "--output", path)
    assert "A service was at work" in done.output
    assert "A service was at work" in path.read_text(encoding="utf-8")
    assert data_of(path)["overview"]["live"] is False, "the file does not go on"
    assert data_of(path)["points"]["1"]["s/x"]["mean"] == list(range(100))
    assert left.status().problems == []
    left.down()
    done = write_report(left.directory.parents[1], "--output", path)
    assert "Nobody finished left" in done.output
    assert "newest of" not in done.output


def test_the_newest_of_several(left: LocalService, finished: Path, tmp_path: Path) -> None:
    """Of a directory of directories the newest is taken; which one, and of how many, is said."""
    shutil.copytree(finished, tmp_path / "project" / "old")
    an_hour_ago_s = time.time() - 3600
    os.utime(tmp_path / "project" / "old" / "service.json", (an_hour_ago_s, an_hour_ago_s))
    done = write_report(tmp_path / "project", "--output", tmp_path / "r.html")
    assert f"{left.directory} is the newest of 2" in done.output
    assert data_of(tmp_path / "r.html")["overview"]["runs"][0]["name"] == "left"


def test_a_long_name_is_cut_to_a_file_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File systems count the bytes of a name, of which a letter may have four."""
    shutil.copytree(finished, tmp_path / "long")
    state = load_left_state(tmp_path / "long")
    (run,) = state.runs
    run.info = msgspec.structs.replace(run.info, name="模" * 110)
    save_state(tmp_path / "long", state)
    monkeypatch.chdir(tmp_path)
    write_report(tmp_path / "long")
    (written,) = tmp_path.glob("*.html")
    assert set(written.stem) == {"模"}


def test_damage_is_told(finished: Path, tmp_path: Path) -> None:
    """Bytes that flipped on disk cost the rows around them, and the file says so."""
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    segment = max((damaged / "outbox").glob("*.log"), key=lambda path: path.stat().st_size)
    content = bytearray(segment.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 40] = b"\0" * 40
    segment.write_bytes(content)
    path = tmp_path / "r.html"
    done = write_report(damaged, "--output", path)
    assert "of the outbox cannot be read" in done.output
    assert "of the outbox cannot be read" in path.read_text(encoding="utf-8")
    assert 0 < len(data_of(path)["points"]["1"]) <= 30


@pytest.mark.parametrize("name", ["nothing", "empty", "a file"])
def test_what_is_no_run(name: str, tmp_path: Path) -> None:
    """A directory without a run is refused, as other commands refuse it; no file is left."""
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name == "a file":
        (tmp_path / name).touch()
    done = write_report(tmp_path / name, "--output", tmp_path / "r.html", code=EXIT_DIRECTORY)
    assert str(tmp_path / name) in done.output
    assert not (tmp_path / "r.html").exists()


class ManySeries:
    """A source with so many series of a million points each."""

    def __init__(self, count: int) -> None:
        names = [f"stage_{number % 40}/metric_{number}" for number in range(count)]
        self._series = [
            {"key": name, "namespace": name.split("/")[0], "axis": None} for name in names
        ]
        self.asked: list[int] = []

    def overview(self) -> dict[str, Any]:
        return {
            "runs": [{"number": 1, "name": "many", "rows": 1_000_000}],
            "run": 1,
            "status": None,
        }

    def series(self, run: int) -> dict[str, Any]:
        return {"run": run, "series": self._series}

    def points(self, run: int, keys: Any, points: int) -> dict[str, Any]:
        self.asked.append(points)
        values = [math.sin(place) for place in range(points)]
        chart = {"axis": None, "x": list(range(points)), "points": 1_000_000, "last": 0.5}
        chart |= {"min": values, "mean": values, "max": values}
        return {"series": dict.fromkeys(keys, chart)}


@pytest.mark.parametrize("count", [10, 2_000, MOST_SERIES + 7])
def test_size_is_bounded(count: int, tmp_path: Path) -> None:
    """Very many series have fewer points each, beyond that they are left out, and it is told."""
    source = ManySeries(count)
    contents = collect(source)
    points = sum(len(one["x"]) for one in contents.points["1"].values())
    assert points <= MOST_POINTS
    assert contents.points_per_series == {10: 600, 2_000: 125}.get(count, 50)
    assert set(source.asked) == {contents.points_per_series}
    assert contents.left_out_series == max(count - MOST_SERIES, 0)
    assert contents.thinned_series == contents.shown_series
    assert len(json.dumps(contents.as_json())) < 25_000_000


def test_pictures_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of very many stages and series the first are drawn, and what is left out is named."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(pictures, "MOST_PICTURES", 2)
    monkeypatch.setattr(pictures, "MOST_CHARTS", 2)
    drawn = pictures.draw_pictures(collect(ManySeries(130), 50), tmp_path)
    assert [path.name for path in drawn.files] == ["stage_0.png", "stage_1.png"]
    assert drawn.left_out == [
        "the delivery, of which nothing is known",
        "pictures of stage_2, stage_3, stage_4 and 35 more (at most 2)",
        "4 series beyond the first 2 of their picture",
    ]
