"""The web page in a real browser, on what a real service wrote: what it shows is what was logged.

Screenshots of every view go to ``$RAYWB_SCREENSHOTS``, else into the tests' own directory.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import SCREENSHOTS, Tab, chromium, served
from local_service import LocalService, local_service
from ray_cluster import FOREIGN
from watched_run import (
    BOTTLENECK,
    HOSTILE,
    MANY_NODES,
    NODES,
    PIPELINE_STAGES,
    RANKS,
    STEPS,
    log_run,
    log_two_directories,
)

from raywb.service.outbox import Outbox, OutRow
from raywb.view.page.application import STATIC

VIEWS = ("overview", "pipelines", "training", "nodes", "delivery")

#: Series of the run that has very many.
MANY = 2000

#: The run of a second directory, and its rows: enough to be seen while they are read.
SECOND = 100_000_001
SECOND_ROWS = 150_000

#: How many rows the server knows of.
ROWS_TOLD = """async () => (await (await fetch('api/overview')).json()).runs.at(-1).rows"""

#: Least contrast of text, WCAG 2.1 AA.
CONTRAST = 4.5


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """Three runs: one that is over, one with very many series, and one that is open."""
    directory = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(FOREIGN) and name != SCREENSHOTS:
                patch.delenv(name)
        patch.setenv("HOME", str(directory))
        patch.setenv("RAYWB_JOURNAL_DIR", str(directory / "journals"))
        with local_service(directory) as local:
            local.up()
            local.start(name=HOSTILE, mode="disabled")
            client = local.client("training/over")
            for step in range(5):
                client.log({"loss": 1.0 / (step + 1)}, step=step)
            assert client.flush(20.0)
            assert local.service is not None
            assert local.service.finish(60.0, 0).complete
            local.start(name="many", mode="disabled")
            client = local.client("many")
            for step in range(20):
                client.log({f"layer_{n // 500}/v{n % 500}": n + step for n in range(MANY)})
            assert client.flush(20.0)
            assert local.service.finish(60.0, 0).complete
            local.start(name="world-models-v2")
            log_run(local)
            yield local


@pytest.fixture(scope="module")
def url(service: LocalService) -> str:
    """The page of the service itself, on loopback."""
    assert service.service is not None
    return f"http://127.0.0.1:{service.service.page_address().loopback_port}/"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = os.environ.get(SCREENSHOTS)
    path = Path(wanted) if wanted else tmp_path_factory.mktemp("screenshots")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="module")
def shared_tab(browser: Any, url: str) -> Iterator[Tab]:
    tab = Tab(browser, url)
    yield tab
    tab.close()


@pytest.fixture
def tab(shared_tab: Tab) -> Iterator[Tab]:
    """A tab in which nothing may go wrong, and which may ask nobody but the server."""
    shared_tab.requests.clear()
    yield shared_tab
    assert shared_tab.errors == []
    assert shared_tab.foreign_requests == []


def rows_of(service: LocalService, run: int) -> list[OutRow]:
    """Every row of a run as it lies in the outbox."""
    outbox = Outbox(service.directory / "outbox", read_only=True)
    items = [item for batch in outbox.recover() for item in batch.items]
    outbox.close()
    return [item for item in items if isinstance(item, OutRow) and item.run == run]


def values_of(rows: list[OutRow], key: str) -> list[float]:
    found = [row.metrics[key] for row in rows if key in row.metrics]
    return [float(value) for value in found if isinstance(value, int | float)]


def described(page: Any, title: str, within: str = "main") -> str:
    """What a chart tells those who cannot see it, once it is drawn."""
    chart = page.locator(f"{within} raywb-chart", has=page.get_by_text(title, exact=True)).first
    chart.locator("canvas").wait_for()
    return str(chart.locator("[role=img]").get_attribute("aria-label"))


def numbers_in(text: str) -> list[float]:
    plain = text.replace(",", "").replace("−", "-")
    return [float(one) for one in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", plain)]


def test_training_shows_the_values_of_the_outbox(service: LocalService, tab: Tab) -> None:
    """Last value, extent and number of points of a chart are those of the outbox's rows."""
    page = tab.show("training?key=training/pretrain/grad_norm")
    values = values_of(rows_of(service, 3), "training/pretrain/grad_norm")
    last, low, high, count = numbers_in(described(page, "grad_norm").split("last")[1])
    assert count == len(values) == STEPS
    expected = (values[-1], min(values), max(values))
    assert (last, low, high) == pytest.approx(expected, rel=1e-3)
    loss = [one for one in values_of(rows_of(service, 3), "training/pretrain/loss")]
    assert sum(map(math.isnan, loss)) == 1, "of a NaN only the gap is drawn"
    assert numbers_in(described(page, "loss").split("last")[1])[2] == pytest.approx(
        max(one for one in loss if not math.isnan(one)), rel=1e-3
    )
    spread = described(page, "step_time_s, by rank")
    assert spread.count("last") == RANKS


def test_pipelines_show_the_flow_and_its_bottleneck(service: LocalService, tab: Tab) -> None:
    """Stages stand in their order with their newest counts; the one that holds up is marked."""
    page = tab.show("pipelines")
    row = next(row for row in reversed(rows_of(service, 3)) if "xenna/progress" in row.metrics)
    stages = page.locator(".flow > .stage")
    stages.first.wait_for()
    assert stages.count() == len(PIPELINE_STAGES)
    for index, name in enumerate(PIPELINE_STAGES):
        text = stages.nth(index).inner_text()
        assert name.removesuffix("_stage").replace("_", " ") in text
        assert f"{row.metrics[f'xenna/stage/{name}/tasks_completed']:,}" in text
        assert f"{row.metrics[f'xenna/stage/{name}/slots_used']} of" in text
        assert ("bottleneck" in text) is (index == BOTTLENECK)
    assert described(page, "Throughput").count("last") == 2


def test_nodes_show_each_node_and_its_newest_values(service: LocalService, tab: Tab) -> None:
    """The heat map has a line per node; what it says last is the newest row's."""
    page = tab.show("nodes?metric=gpu_percent")
    page.wait_for_selector("raywb-heat-map canvas[aria-label*=Newest]")
    label = page.locator("raywb-heat-map canvas").get_attribute("aria-label")
    row = next(row for row in reversed(rows_of(service, 3)) if "nodes/time_s" in row.metrics)
    said = dict(re.findall(r"(gpu-node-\d+) ([\d.]+)", label))
    expected = {name: row.metrics[f"nodes/{name}/gpu_percent"] for name in NODES}
    assert {name: float(value) for name, value in said.items()} == pytest.approx(expected, rel=1e-3)
    page.locator("#metric").select_option("cpu_percent")
    page.wait_for_url("**metric=cpu_percent*")
    assert page.locator("table").first.locator("tbody tr").count() == len(NODES)


def test_delivery_shows_how_far_the_rows_are(service: LocalService, tab: Tab) -> None:
    """Rows in, finished rows, those in W&B's files, and each source are as the service says."""
    status = service.wait_for(lambda status: status.backlog_rows == 0)
    page = tab.show("delivery")
    wanted = {
        "Rows in": status.received_rows,
        "Finished rows": status.outbox_rows,
        "In W&B's files": status.sink.applied_rows,
        "Waiting": 0,
    }
    for name, number in wanted.items():
        cell = page.locator(".numbers > div", has_text=name)
        cell.get_by_text(f"{number:,}", exact=True).wait_for()
    sources = page.get_by_role("region", name="Processes that log").locator("tbody tr")
    assert sources.count() == len(status.sources)
    assert page.get_by_text("Nothing is lost.").count() == 1


def test_new_rows_appear_by_themselves(service: LocalService, tab: Tab) -> None:
    """A row that is logged while the page is open is in its chart, without a reload."""
    client = service.client("training/live")
    client.log({"loss": 0.5}, step=1)
    page = tab.show("overview")
    page = tab.show("training?key=training/live/loss")
    page.wait_for_selector(".focus raywb-chart [aria-label*='last 0.5,']")
    assert page.locator(".connection[data-state=live]").inner_text() == "live"
    page.evaluate("window.isSame = true")
    tab.requests.clear()
    client.log({"loss": 0.25}, step=2)
    page.wait_for_selector(".focus raywb-chart [aria-label*='last 0.25,']")
    assert page.evaluate("window.isSame")
    asked = {re.sub(r".*/api/(\w+).*", r"\1", one) for one in tab.requests}
    assert asked <= {"series", "points"}, "the stream stays open, and nothing is polled"


def test_a_lost_connection_is_seen_and_comes_back(
    service: LocalService, browser: Any, url: str
) -> None:
    """While the server is away the page says so and shows what it has; then it is live again."""
    tab = Tab(browser, url)
    page = tab.show("overview")
    page.wait_for_selector(".connection[data-state=live]")
    tab.context.set_offline(True)
    _listen_anew(page)
    page.wait_for_selector(".connection[data-state=lost]")
    assert page.locator("h1").inner_text() == "world-models-v2"
    tab.context.set_offline(False)
    page.wait_for_selector(".connection[data-state=live]", timeout=20_000)
    # After an answer that is no stream a browser gives up: then the page itself tries again.
    page.route("**/api/events", lambda route: route.fulfill(status=503, json={"error": "full"}))
    _listen_anew(page)
    page.wait_for_selector(".connection[data-state=lost]")
    page.unroute("**/api/events")
    page.wait_for_selector(".connection[data-state=live]", timeout=20_000)
    tab.close()


def test_many_tabs_share_one_stream(service: LocalService, browser: Any, url: str) -> None:
    """A browser has six connections per server: eight tabs load all the same, and are all told."""
    first = Tab(browser, url)
    pages = [first.page, *(first.context.new_page() for _ in range(7))]
    streams: list[str] = []
    first.context.on(
        "request", lambda request: streams.append(request.url) if "events" in request.url else None
    )
    for page in pages:
        page.goto(f"{url}#/overview")
        page.wait_for_selector(".connection[data-state=live]")
    client = service.client("training/shared")
    client.log({"loss": 0.125}, step=77)
    for page in pages:
        page.locator(".card", has_text="training/shared").wait_for()
    assert len(streams) == 1
    pages[0].close()
    client.log({"loss": 0.125}, step=78)
    for page in pages[1:]:
        card = page.locator(".card", has_text="training/shared")
        card.get_by_text("step 78", exact=True).wait_for()
    assert len(streams) == 2, "one of the others has it now"
    first.close()


def test_a_tab_that_is_not_seen_has_no_stream(browser: Any, url: str) -> None:
    """Hidden, it lets go of its connection; seen again, it is told again."""
    tab = Tab(browser, url)
    tab.page.add_init_script(
        """window.open_streams = 0;
        const Real = EventSource;
        window.EventSource = class extends Real {
            constructor(url) { super(url); window.open_streams += 1; }
            close() { super.close(); window.open_streams -= 1; }
        };"""
    )
    page = tab.show("overview")
    page.wait_for_selector(".connection[data-state=live]")
    for hidden, streams in ((True, 0), (False, 1)):
        page.evaluate(
            """(hidden) => {
                Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
                document.dispatchEvent(new Event('visibilitychange'));
            }""",
            hidden,
        )
        page.wait_for_function("(streams) => window.open_streams === streams", arg=streams)
    tab.close()
    assert tab.errors == []


def test_without_a_stream_the_page_asks(service: LocalService, browser: Any, url: str) -> None:
    """Where no stream opens, as behind some proxies, and where there are no locks, it is live."""
    for lacks in ("stream", "locks"):
        tab = Tab(browser, url)
        if lacks == "stream":
            tab.page.route("**/api/events", lambda route: None)
        else:
            script = "Object.defineProperty(Navigator.prototype, 'locks', {value: undefined});"
            tab.page.add_init_script(script)
        page = tab.show("overview")
        page.wait_for_selector(".connection[data-state=live]")
        if lacks == "stream":
            service.client("training/no_stream").log({"loss": 1.0}, step=1)
            page.locator(".card", has_text="training/no_stream").wait_for()
        else:
            assert not any("events" in one for one in tab.requests)
        tab.close()
        assert tab.errors == []


def _listen_anew(page: Any) -> None:
    """As after a visit to another page: Chromium lets a stream that is open go on offline."""
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide'))")
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))")


def test_a_finished_run_says_so(tab: Tab) -> None:
    """Its state stands where a running one is called live, and its charts are there."""
    page = tab.show("training?run=1")
    page.wait_for_selector(".connection[data-state=ended]")
    assert page.locator(".connection").inner_text() == "finished"
    assert "5 points" in described(page, "loss")


def test_a_directory_shows_the_same(service: LocalService, browser: Any) -> None:
    """`raywb ui DIR` shows what the service shows: the same series, flow and nodes."""
    with served(service.directory) as address:
        tab = Tab(browser, address)
        page = tab.show("training?key=training/sft/loss")
        assert f"{STEPS} points" in described(page, "loss", ".focus")
        page = tab.show("pipelines")
        page.wait_for_selector(".stage.bottleneck")
        page = tab.show("nodes")
        page.wait_for_selector("raywb-heat-map canvas[aria-label*=Newest]")
        tab.close()
    assert tab.errors == []


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`raywb ui` on two directories, of which nobody has asked for the second yet."""
    root = tmp_path_factory.mktemp("two")
    log_two_directories(root, rows=SECOND_ROWS)
    with served(root) as address:
        yield address


def test_a_second_directory_is_read_to_its_end(second: str, browser: Any) -> None:
    """Shown while its rows are still read, a run says so, and in the end has all of them."""
    tab = Tab(browser, second)
    page = tab.show(f"training?run={SECOND}&key=t/loss")
    page.wait_for_selector("#top .reading .bar")
    page.wait_for_selector(f".focus [role=img][aria-label*='{SECOND_ROWS:,} points']")
    page.wait_for_function("() => !document.querySelector('#top .reading')")
    label = page.locator(".focus [role=img]").get_attribute("aria-label")
    assert f"last {SECOND_ROWS - 1:,}," in label, "the last value, not the last bucket's mean"
    assert page.locator(".focus .readout b").inner_text() == f"{SECOND_ROWS - 1:,}"
    tab.show(f"training?run={SECOND}&key=t/loss&axis=row&from=0&to=70000.5")
    page.wait_for_selector(".focus [role=img][aria-label*='last 70,000,']")
    tab.requests.clear()
    tab.show(f"training?run={SECOND}")
    page.locator("raywb-chart canvas").nth(4).wait_for()
    assert len(tab.requests) <= 2, "nothing is asked for again once all is read"
    tab.close()
    assert tab.errors == []


def test_of_very_many_nodes_the_extremes_are_shown(second: str, browser: Any) -> None:
    """The heat map stays as high as a screen, asks for no more than it shows, and says so."""
    tab = Tab(browser, second)
    page = tab.show("nodes?run=1")
    page.wait_for_selector("raywb-heat-map canvas[aria-label*=Newest]")
    page.get_by_text(f"64 of {MANY_NODES} nodes").wait_for()
    label = page.locator("raywb-heat-map canvas").get_attribute("aria-label")
    shown = {int(one) for one in re.findall(r"\bn(\d+) ", label)}
    assert shown == {*range(32), *range(MANY_NODES - 32, MANY_NODES)}
    asked = sum(one.count("cpu_percent") for one in tab.requests if "api/points" in one)
    assert asked <= 64 + 4
    tab.close()


def test_lines_of_one_chart_lose_no_point(tab: Tab) -> None:
    """Where lines with different steps meet, points of the same step are one with their range."""
    page = tab.show("training")
    line = {"x": [1, 1, 2, 2, 3], "min": [4, 1, None, 5, 6], "max": [4, 2, None, 5, 6]}
    line["mean"] = [4, 1, None, 5, 6]
    merged = page.evaluate(
        "async (line) => (await import('raywb/plot')).merged({...line, last: 6})", line
    )
    assert (merged["x"], merged["last"]) == ([1, 2, 3], 6)
    assert (merged["min"], merged["max"]) == ([1, 5, 6], [4, 5, 6])
    assert merged["mean"] == [2.5, 5, 6]


def test_a_run_is_not_told_of_as_another_with_its_id(second: str, browser: Any) -> None:
    """The state of the present run is shown for it alone, also where two runs have one id."""
    tab = Tab(browser, second)
    page = tab.show("overview?run=1")
    page.locator(".delivery-line").wait_for()
    page = tab.show(f"overview?run={SECOND}")
    page.locator("h1", has_text="old").wait_for()
    page.locator(".card").or_(page.get_by_text("without a stage")).first.wait_for()
    assert page.locator(".delivery-line").count() == 0
    assert page.get_by_text("Nothing has logged").count() == 0
    page = tab.show(f"delivery?run={SECOND}")
    page.get_by_text("How this run was delivered is not known here").wait_for()
    tab.close()
    assert tab.errors == []


def test_a_run_that_cannot_be_asks_nothing(tab: Tab) -> None:
    """An address with a run that is no number shows the present one, and does not flood."""
    page = tab.show("overview?run=abc")
    page.reload()
    page.locator("h1", has_text="world-models-v2").wait_for()
    page.wait_for_timeout(300)
    assert len([one for one in tab.requests if "/api/" in one]) < 5


def test_the_first_trouble_is_shown(browser: Any, url: str) -> None:
    """Who is refused from the beginning reads why."""
    tab = Tab(browser, url)
    refusal = {"error": "this directory cannot be read"}
    for path in ("events", "overview"):
        tab.page.route(f"**/api/{path}", lambda route: route.fulfill(status=503, json=refusal))
    tab.page.goto(url)
    tab.page.locator("main", has_text=refusal["error"]).wait_for()
    tab.close()


def test_charts_come_back_after_a_failure(browser: Any, url: str) -> None:
    """A refusal is told of, and the question asked again, whether or not new rows come."""
    tab = Tab(browser, url)
    busy = {"error": "busy"}
    tab.page.route("**/api/points*", lambda route: route.fulfill(status=503, json=busy))
    page = tab.show("nodes")
    page.set_viewport_size({"width": 1360, "height": 1800})
    told = page.get_by_text("These points could not be had: busy")
    told.and_(page.locator("raywb-heat-map p")).wait_for()
    told.and_(page.locator("raywb-chart p")).first.wait_for()
    page.unroute("**/api/points*")
    page.wait_for_selector("raywb-heat-map canvas[aria-label*=Newest]")
    page.locator("raywb-chart [aria-label*='last']").first.wait_for()
    assert told.count() == 0
    tab.close()


def test_a_slow_list_of_series_is_shown(service: LocalService, browser: Any, url: str) -> None:
    """In a live run its answer is shown, however many overviews came while it was on its way."""
    tab = Tab(browser, url)
    asked: list[Any] = []
    tab.page.route("**/api/series*", lambda route: asked.append(route))
    client = service.client("training/slow")
    page = tab.show("training")
    told = page.evaluate(ROWS_TOLD)
    client.log({"loss": 1.0}, step=1)
    page.wait_for_function(f"async (told) => (await ({ROWS_TOLD})()) > told", arg=told)
    page.wait_for_timeout(1200)  # the overview's own pace
    assert len(asked) == 1, "one request at a time"
    asked[0].continue_()
    page.locator("raywb-chart").first.wait_for()
    tab.close()


def test_names_and_keys_are_never_markup(tab: Tab) -> None:
    """A run and keys that are called like HTML are shown as they are called, and nothing runs."""
    page = tab.show("overview?run=1")
    assert page.locator("h1").inner_text() == HOSTILE
    assert HOSTILE in page.title()
    for view in VIEWS:
        tab.show(f"{view}?run=3")
    page = tab.show("training?run=3&filter=onerror")
    page.locator("raywb-chart .title", has_text=HOSTILE).first.wait_for()
    assert page.locator("img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_zoom_asks_for_its_range_and_is_in_the_address(tab: Tab) -> None:
    """Dragging over a chart fetches that range; double click, back and forward lead out and in."""
    page = tab.show("training?filter=pretrain%2Floss")
    described(page, "loss")
    box = page.locator("raywb-chart .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=3)
    page.mouse.up()
    page.wait_for_url("**from=*")
    begin, end = (float(re.search(rf"{name}=([\d.]+)", page.url)[1]) for name in ("from", "to"))
    assert begin == pytest.approx(10 * STEPS / 4, rel=0.1)
    assert end == pytest.approx(10 * STEPS / 2, rel=0.1)
    within = sum(begin <= 10 * step <= end for step in range(STEPS))
    page.wait_for_selector(f"raywb-chart [aria-label*=' {within} points']")
    assert any("from=" in one and "api/points" in one for one in tab.requests)
    page.locator("raywb-chart .u-over").first.dblclick()
    page.wait_for_selector(f"raywb-chart [aria-label*=' {STEPS} points']")
    assert "from=" not in page.url
    page.go_back()
    page.wait_for_selector(f"raywb-chart [aria-label*=' {within} points']")
    page.go_forward()
    page.wait_for_selector(f"raywb-chart [aria-label*=' {STEPS} points']")


def test_a_stage_can_be_linked_to(tab: Tab) -> None:
    """The link of a stage, copied and opened anew, shows that stage."""
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = tab.show("pipelines")
    page.get_by_label(f"Copy the link to stage {PIPELINE_STAGES[1]}").click()
    page.wait_for_selector("button.copy[data-done]")
    link = page.evaluate("navigator.clipboard.readText()")
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector(".stage.selected")
    assert "download" in page.locator(".stage.selected").inner_text()
    assert "last" in described(page, "queue_in")


def test_what_the_address_names_is_in_view(tab: Tab) -> None:
    """A link to a stage far down leads there; a click on a chart's title shows it large."""
    page = tab.show("training?run=3&stage=training/sft")
    in_view = """(selector) => {
        const {top} = document.querySelector(selector).getBoundingClientRect();
        return top >= 0 && top < innerHeight / 2;
    }"""
    page.wait_for_function(in_view, arg=".group.selected")
    page.locator(".group.selected raywb-chart a.title").last.click()
    page.wait_for_selector(".focus raywb-chart canvas")
    page.wait_for_function(in_view, arg=".focus")


def test_everything_can_be_done_with_the_keyboard(tab: Tab) -> None:
    """Views, filter, axis, logarithm, sections, help: each key does what the help says."""
    page = tab.show("overview")
    for number, view in enumerate(VIEWS, 1):
        page.keyboard.press(str(number))
        page.wait_for_selector(f"main[data-view={view}]")
    page.keyboard.press("/")
    page.wait_for_selector("#filter:focus")
    page.keyboard.type("loss 2")
    page.wait_for_url("**filter=loss+2*")
    page.keyboard.press("Escape")
    page.keyboard.press("x")
    page.wait_for_url("**x=time*")
    page.keyboard.press("l")
    page.wait_for_url("**log=1*")
    page.keyboard.press("1")
    page.wait_for_selector("main[data-view=overview]")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Run"
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") != "Run"
    page.keyboard.press("[")
    page.wait_for_url("**run=2*")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("t")
    assert page.locator("dialog[open] kbd").count() > 10
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_the_theme_follows_the_system_until_it_is_chosen(tab: Tab) -> None:
    """Dark where the system is; what is chosen is kept for the next visit."""
    theme = "document.documentElement.dataset.theme"
    page = tab.show("overview")
    assert page.evaluate(theme) == "light"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"() => {theme} === 'dark'")
    page.keyboard.press("t")
    assert page.evaluate(theme) == "light"
    page.reload()
    page.wait_for_selector("main[data-view]")
    assert page.evaluate(theme) == "light"
    page.evaluate("localStorage.clear()")


def test_a_small_screen_scrolls_in_one_direction(tab: Tab, pictures: Path) -> None:
    """At 360 pixels no view is wider than the screen."""
    tab.page.set_viewport_size({"width": 360, "height": 740})
    for view in VIEWS:
        page = tab.show(view)
        page.wait_for_function("() => !document.querySelector('main > .empty')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, view
        page.screenshot(path=pictures / f"{view}-360.png")
    tab.page.set_viewport_size({"width": 1360, "height": 900})


def test_two_thousand_series_open_at_once(tab: Tab) -> None:
    """Of very many charts only those in view are made and asked for, and the page answers."""
    page = tab.show("training?run=2&filter=v")
    page.reload()
    page.locator("raywb-chart canvas").first.wait_for()
    timing = page.evaluate("performance.now()")
    print(f"first chart of {MANY} after {timing:.0f} ms")
    assert page.locator(".counted").inner_text() == "2,000 series"
    assert page.locator("raywb-chart").count() < 150
    asked = [one for one in tab.requests if "api/points" in one]
    assert 0 < sum(one.count("&key=") for one in asked) < 150
    # Longest time that the main thread gives to nobody, while all of them scroll past.
    longest = page.evaluate(
        """async () => {
            let longest = 0, last = performance.now();
            const end = last + 1200;
            while (last < end) {
                scrollBy(0, 1500);
                await new Promise(requestAnimationFrame);
                const now = performance.now();
                longest = Math.max(longest, now - last);
                last = now;
            }
            return longest;
        }"""
    )
    print(f"longest frame while scrolling {longest:.0f} ms")
    assert page.locator("raywb-chart").count() < 150


def test_every_control_has_a_name(tab: Tab) -> None:
    """Landmarks, one first heading, and a name for every control, picture and region."""
    for view in VIEWS:
        page = tab.show(view)
        page.wait_for_function("() => !document.querySelector('main > .empty')")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll(
                    'a, button, input, select, [role=img], [role=meter], section')]
                .filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim()
                    || one.labels?.length || one.title)).map((one) => one.outerHTML)"""
        )
        assert nameless == [], view
        assert page.locator("h1").count() == 1, view
        assert page.locator("header nav a[aria-current=page]").count() == 1, view
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
        assert len(ids) == len(set(ids)), view


def test_texts_can_be_read_in_both_themes() -> None:
    """Every colour of text has the contrast of WCAG AA on every ground that it stands on."""
    style = (STATIC / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(
            r"^:root(?:\[data-theme=\"dark\"\])? \{(.*?)^\}", style, re.S | re.M
        )
    )
    for theme in (light, dark):
        grounds = {"page", "surface", "sunk"}
        pairs = {(text, ground) for text in ("text", "text-2") for ground in grounds}
        pairs |= {("text-3", "page"), ("text-3", "surface"), ("surface", "accent")}
        pairs |= {(kind, f"{kind}-soft") for kind in ("accent", "good", "warn", "bad")}
        pairs |= {(kind, "surface") for kind in ("accent", "good", "warn", "bad")}
        low = {pair: round(_contrast(*(theme[one] for one in pair)), 2) for pair in pairs}
        assert {pair: one for pair, one in low.items() if one < CONTRAST} == {}


def _contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG 2.1 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_drawn(tab: Tab, pictures: Path, scheme: str) -> None:
    """Each view in each theme: charts have lines, nothing is reported; the pictures are kept."""
    tab.page.emulate_media(color_scheme=scheme)
    for view in VIEWS:
        page = tab.show(view)
        if view in ("pipelines", "training", "nodes"):
            page.wait_for_function(
                """() => [...document.querySelectorAll('main canvas')].some((canvas) =>
                    canvas.width && canvas.getContext('2d')
                        .getImageData(0, 0, canvas.width, canvas.height).data.some((one) => one))"""
            )
        page.wait_for_timeout(150)  # the last bars move into place
        page.screenshot(path=pictures / f"{view}-{scheme}.png")


def test_the_same_page_is_a_report(tab: Tab, browser: Any, tmp_path: Path) -> None:
    """With its data in it, as README.md says, one file shows the same and asks nobody."""
    page = tab.show("training")
    data = page.evaluate(
        """async () => {
            const get = async (path) => (await fetch(path)).json();
            const overview = await get('api/overview');
            const run = overview.run;
            const key = 'training/sft/loss';
            const points = await get(`api/points?run=${run}&key=${encodeURIComponent(key)}`);
            overview.live = false;
            return {overview, series: {[run]: await get(`api/series?run=${run}`)},
                points: {[run]: points.series}};
        }"""
    )
    file = tmp_path / "report.html"
    file.write_text(_inlined(data))
    report = Tab(browser, file.as_uri())
    page = report.show("training?filter=sft%2Floss")
    assert f"{STEPS} points" in described(page, "loss")
    assert page.locator(".connection").inner_text() == "report"
    assert report.errors == []
    assert [one for one in report.requests if not one.startswith(("file:", "data:"))] == []
    report.close()


def _inlined(data: dict[str, Any]) -> str:
    """The page in one file: styles, modules as addresses of the import map, and its data."""
    import base64

    def style(match: re.Match[str]) -> str:
        return f"<style>{(STATIC / match[1]).read_text()}</style>"

    def address(match: re.Match[str]) -> str:
        text = (STATIC / match[1]).read_bytes()
        return f'"data:text/javascript;base64,{base64.b64encode(text).decode()}"'

    page = (STATIC / "index.html").read_text()
    page = re.sub(r'<link rel="icon"[^>]*>', "", page)
    page = re.sub(r'<link rel="stylesheet" href="static/([^"]+)">', style, page)
    page = re.sub(r'"\./static/([^"]+)"', address, page)
    begin = '<script type="module" src="static/main.js"></script>'
    assert begin in page
    embedded = json.dumps(data).replace("<", "\\u003c")
    policy = (
        "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; "
        "img-src data:"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{meta}')
    return page.replace(
        begin,
        f'<script type="application/json" id="raywb-data">{embedded}</script>'
        '<script type="module">import "raywb/main";</script>',
    )


def test_uplot_is_the_published_one() -> None:
    """The vendored library is what npm has under its version, to the byte, with its licence."""
    import hashlib

    digest = hashlib.sha256((STATIC / "uplot-1.6.32.js").read_bytes()).hexdigest()
    assert digest == "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba"
    assert "MIT License" in (STATIC / "uplot-1.6.32.LICENSE.txt").read_text()


def test_no_script_makes_markup_of_data() -> None:
    """None of our modules sets HTML, evaluates text, or loads a module at run time."""
    for file in STATIC.glob("*.js"):
        if file.name.startswith("uplot"):
            continue
        text = file.read_text()
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|import\(", text
        )
        assert found == [], file.name
