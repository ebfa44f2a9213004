"""The 20 metrics follow exactly from the runs, at the edges too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raywb.fleet.details import DetailRules, compute_details, main_regex
from raywb.fleet.metrics import METRICS, FleetRules, compute
from raywb.fleet.runs import SPS_KEYS, FleetRun, Window, iso_time, run_from_node
from raywb.fleet.terminal import _throughput

HOUR_S = 3600.0
NOW_S = 1_800_000_000.0
WINDOW = Window.until(NOW_S, 24)

#: SPEC B, in its order.
NAMES = [
    "wandb.runs.active",
    "wandb.runs.completed_24h",
    "wandb.runs.failed_24h",
    "wandb.runs.total_recent",
    "wandb.training.avg_duration_hours",
    "wandb.training.total_gpu_hours_24h",
    "wandb.push_to_main.runs_completed_24h",
    "wandb.push_to_main.runs_failed_24h",
    "wandb.push_to_main.success_rate_pct",
    "wandb.push_to_main.avg_duration_hours",
    "wandb.push_to_main.overview.steps_per_second",
    "wandb.push_to_main.overview.epoch_steps_per_second",
    "wandb.push_to_main.overview.sps",
    "wandb.push_to_main.timing_cumulative.sps",
    "wandb.push_to_main.timing_per_epoch.sps",
    "wandb.sweep.runs_total_24h",
    "wandb.sweep.runs_completed_24h",
    "wandb.sweep.runs_failed_24h",
    "wandb.sweep.runs_active",
    "wandb.sweep.success_rate_pct",
]

MAIN = "github.sky.main.0a1b2c.tiny.2026-11-20"


def run(
    name: str = "r",
    state: str = "finished",
    begun_h: float | None = -3,
    heard_h: float | None = -1,
    **further: Any,
) -> FleetRun:
    """A run that began and was last heard of so many hours from now."""
    run.number += 1
    return FleetRun(
        id=f"{name}-{run.number}",
        name=name,
        state=state,
        created_s=None if begun_h is None else NOW_S + begun_h * HOUR_S,
        heartbeat_s=None if heard_h is None else NOW_S + heard_h * HOUR_S,
        **further,
    )


run.number = 0


def values(*runs: FleetRun, **rules: Any) -> dict[str, float]:
    return {one.name: one.value for one in compute(runs, WINDOW, FleetRules(**rules))}


def node(**fields: Any) -> dict[str, Any]:
    """A run as GraphQL gives it."""
    base = {"displayName": MAIN, "state": "finished", "sweepName": None, "config": "{}"}
    times = {"createdAt": iso_time(NOW_S - 7200), "heartbeatAt": iso_time(NOW_S - 3600)}
    return {"name": "r", "summaryMetrics": "{}", **base, **times, **fields}


def test_exactly_these_twenty() -> None:
    """The names are those of the contract, in its order, and each can have a value."""
    assert list(METRICS) == NAMES
    assert len(NAMES) == 20
    full = values(
        run(MAIN + ".sweep", sps=dict.fromkeys(SPS_KEYS, 2.0)),
        run(MAIN, "failed"),
    )
    assert list(full) == NAMES


def test_empty_project() -> None:
    """Of no runs every count is 0, so is the total; rates and means are left out."""
    found = values()
    left_out = {name for name in NAMES if "rate" in name or "avg" in name or "sps" in name}
    left_out |= {name for name in NAMES if name.endswith("_per_second")}
    assert found == dict.fromkeys((name for name in NAMES if name not in left_out), 0)


def test_states() -> None:
    """Each state counts where the contract says, and a pending run only in the total."""
    states = ["running", "finished", "failed", "crashed", "killed", "pending", "preempted"]
    found = values(*(run(state=state) for state in states))
    assert found["wandb.runs.active"] == 1
    assert found["wandb.runs.completed_24h"] == 1
    assert found["wandb.runs.failed_24h"] == 3
    assert found["wandb.runs.total_recent"] == 7


@pytest.mark.parametrize(
    ("state", "begun_h", "heard_h", "belongs"),
    [
        ("finished", -30, -23, True),  # began before, ended in it
        ("finished", -24, -24, True),  # on the edge itself
        ("finished", -24.001, -24.001, False),
        ("finished", -50, -25, False),
        ("running", -500, -400, True),  # still runs, whoever has heard of it
        ("running", -500, None, True),
        ("crashed", -30, -25, False),
        ("pending", -1, None, True),  # created in it, never heard of
        ("finished", None, None, False),
        ("finished", 1, 2, True),  # another clock dates it into the future
        ("finished", -23, -25, True),  # clocks that disagree
    ],
)
def test_window(state: str, begun_h: float, heard_h: float, belongs: bool) -> None:
    """A run belongs to the window if it was created or heard of in it, or still runs."""
    found = values(run(state=state, begun_h=begun_h, heard_h=heard_h))
    assert found["wandb.runs.total_recent"] == belongs


def test_durations() -> None:
    """The mean is over ended runs whose clocks agree; a long run counts with all its hours."""
    found = values(
        run(begun_h=-40, heard_h=-20),
        run(state="crashed", begun_h=-3, heard_h=-3),
        run(state="running", begun_h=-10, heard_h=0),
        run(state="pending", begun_h=-10, heard_h=0),
        run(begun_h=-1, heard_h=-2),  # ended before it began
        run(begun_h=None, heard_h=-2),
        run(begun_h=-2, heard_h=None),
    )
    assert found["wandb.training.avg_duration_hours"] == pytest.approx(10.0)
    assert found["wandb.training.total_gpu_hours_24h"] == pytest.approx(20.0)
    alone = values(run(state="running"))
    assert "wandb.training.avg_duration_hours" not in alone
    assert alone["wandb.training.total_gpu_hours_24h"] == 0


def test_gpu_hours() -> None:
    """Recorded GPUs count, none at all as none, and the assumed number only where none is."""
    runs = [run(gpus=8.0), run(gpus=0.0), run(gpus=None), run(state="running", gpus=64.0)]
    assert values(*runs)["wandb.training.total_gpu_hours_24h"] == pytest.approx(2 * 8 + 2)
    assumed = values(*runs, assumed_gpus=4.0)
    assert assumed["wandb.training.total_gpu_hours_24h"] == pytest.approx(2 * 8 + 2 * 4)


@pytest.mark.parametrize(
    ("config", "gpus"),
    [
        ({"compute.gpu_count": {"value": 4}}, 4.0),
        ({"compute": {"value": {"gpu_count": 4}}}, 4.0),
        ({"compute": {"gpu_count": 4}}, 4.0),
        ({"compute.gpu_count": {"value": 0}, "cluster.gpu_count": {"value": 64}}, 64.0),
        ({"compute.gpu_count": {"value": 0}}, 0.0),
        ({"compute.gpu_count": {"value": "4"}}, None),
        ({"compute.gpu_count": {"value": True}}, None),
        ({"compute.gpu_count": {"value": -1}}, None),
        ({"compute.gpu_count": {"value": None}}, None),
        ({"compute": {"value": [4]}}, None),
        ({"compute": 4}, None),
        ({}, None),
    ],
)
def test_recorded_gpus(config: dict[str, Any], gpus: float | None) -> None:
    """GPUs are read by key and by path, and what is no count was not recorded."""
    assert run_from_node(node(config=json.dumps(config))).gpus == gpus


def test_push_to_main() -> None:
    """Main's and pull requests' runs are push-to-main runs; names that only resemble are not."""
    found = values(
        run(MAIN, begun_h=-5),
        run("github.sky.pr12.0a1b.tiny.x", "killed"),
        run("github.sky.main.0a1b.tiny.x", "running"),
        run("githubXskyXmain.0a1b"),
        run("my.github.sky.main"),
        run("GitHub.sky.main.0"),
    )
    assert found["wandb.push_to_main.runs_completed_24h"] == 1
    assert found["wandb.push_to_main.runs_failed_24h"] == 1
    assert found["wandb.push_to_main.success_rate_pct"] == 50.0
    assert found["wandb.push_to_main.avg_duration_hours"] == pytest.approx(3.0)
    other = values(run("nightly-1"), run(MAIN), push_to_main="nightly-*")
    assert other["wandb.push_to_main.runs_completed_24h"] == 1


def test_rates_of_nothing() -> None:
    """Runs that have not ended make no rate: 0 of 0 is left out, 0 of 1 is 0."""
    active = values(run(MAIN + ".sweep", "running"))
    assert "wandb.push_to_main.success_rate_pct" not in active
    assert "wandb.sweep.success_rate_pct" not in active
    assert active["wandb.sweep.runs_total_24h"] == active["wandb.sweep.runs_active"] == 1
    assert values(run(MAIN, "failed"))["wandb.push_to_main.success_rate_pct"] == 0.0


def test_sweeps() -> None:
    """A sweep's run is known by name or by attribute, and may be a push-to-main run as well."""
    found = values(
        run("lr.sweep.3"),
        run("quiet-name", "crashed", sweep="abc123"),
        run(MAIN, sweep="abc123"),
        run(MAIN + ".sweep"),
        run("sweeping"),
    )
    assert found["wandb.sweep.runs_total_24h"] == 4
    assert found["wandb.sweep.runs_completed_24h"] == 3
    assert found["wandb.sweep.runs_failed_24h"] == 1
    assert found["wandb.sweep.success_rate_pct"] == 75.0
    assert found["wandb.push_to_main.runs_completed_24h"] == 2
    assert found["wandb.runs.total_recent"] == 5


def test_throughput_by_state() -> None:
    """Throughput is the mean over finished and crashed push-to-main runs that have it."""
    sps = [("finished", 100.0), ("crashed", 200.0), ("failed", 1.0), ("killed", 1.0)]
    found = values(
        *(run(MAIN, state, sps={"overview/sps": value}) for state, value in sps),
        run(MAIN, "running", sps={"overview/sps": 1.0}),
        run("other", sps={"overview/sps": 1.0}),
        run(MAIN, sps={"timing_per_epoch/sps": 7.0}),
        run(MAIN, begun_h=-90, heard_h=-80, sps={"overview/sps": 1.0}),
    )
    assert found["wandb.push_to_main.overview.sps"] == 150.0
    assert found["wandb.push_to_main.timing_per_epoch.sps"] == 7.0
    assert "wandb.push_to_main.timing_cumulative.sps" not in found


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (12, 12.0),
        (1.5, 1.5),
        (0, 0.0),
        ({"last": 3, "max": 9}, 3.0),
        ({"mean": 4}, 4.0),
        ({"max": 9}, None),
        (float("nan"), None),
        ("NaN", None),
        ("Infinity", None),
        ("12.5", None),
        ("fast", None),
        (True, None),
        ([1.0], None),
        (10**400, None),
    ],
)
def test_summary_values(value: Any, read: float | None) -> None:
    """Only finite numbers count; whatever else stands in their place is told."""
    found = run_from_node(node(summaryMetrics=json.dumps({"overview/sps": value})))
    assert found.sps.get("overview/sps") == read
    assert found.unusable == (("overview/sps",) if read is None else ())


@pytest.mark.parametrize(
    "summary",
    [
        json.dumps({"overview/sps": 5}),
        json.dumps(json.dumps({"overview/sps": 5})),
        {"overview/sps": 5},
        '{"overview/sps": 5, "text": "a\tcontrol character"}',
    ],
)
def test_summary_wrappings(summary: Any) -> None:
    """A crashed run's summary counts, also as a JSON text in a JSON text."""
    found = run_from_node(node(state="crashed", summaryMetrics=summary))
    assert values(found)["wandb.push_to_main.overview.sps"] == 5


@pytest.mark.parametrize(
    "summary", [None, "", "{", "null", "[]", '"text"', 7, '{"overview/sps": null}']
)
def test_summaries_of_nothing(summary: Any) -> None:
    """A summary that cannot be read is one without values."""
    found = run_from_node(node(summaryMetrics=summary, config=None))
    assert found.sps == {}
    assert found.unusable == ()
    assert values(found)["wandb.push_to_main.runs_completed_24h"] == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-11-20T06:00:00Z", 1795154400.0),
        ("2026-11-20T06:00:00", 1795154400.0),
        ("2026-11-20T06:00:00.5Z", 1795154400.5),
        ("2026-11-20T08:00:00+02:00", 1795154400.0),
        ("yesterday", None),
        (None, None),
        (1795154400, None),
    ],
)
def test_times(text: Any, seconds: float | None) -> None:
    """Times are UTC unless they say otherwise, and what is no time is none."""
    assert run_from_node(node(createdAt=text)).created_s == seconds


def test_values_beyond_floats() -> None:
    """Values that overflow when they are added up, and a bottomless summary, break nothing."""
    huge = {"overview/sps": 1.7e308}
    runs = [run(MAIN, sps=huge, gpus=1e306) for _ in range(5)]
    found = values(*runs)
    assert found["wandb.push_to_main.overview.sps"] == pytest.approx(1.7e308)
    assert "wandb.training.total_gpu_hours_24h" not in found
    (one,) = compute_details(runs, [], WINDOW, DetailRules(), 1.0).throughput
    assert one.change_pct is None or one.change_pct == 0
    deep = '{"overview/sps": 1, "x": ' + "[" * 200_000 + "]" * 200_000 + "}"
    assert run_from_node(node(summaryMetrics=deep)).sps == {}
    assert run_from_node(node(summaryMetrics='{"overview/sps": {"last": {"last": 1}}}')).sps == {}


def test_a_baseline_of_nothing() -> None:
    """Runs whose median is 0 are compared with, and are not said to be too few."""
    runs = [run(MAIN, begun_h=-3 - n, sps={"overview/sps": 0.0}) for n in range(5)]
    details = compute_details(runs, [], WINDOW, DetailRules(), 1.0)
    text = str(_throughput(details))
    assert "only" not in text
    assert "the median of 4 earlier runs is 0" in text


def test_details_of_gpu_hours() -> None:
    """Recorded and assumed GPU-hours add up to the metric, and say of how many runs they are."""
    runs = [run(gpus=8.0), run(gpus=None), run(gpus=None), run(begun_h=-1, heard_h=-2)]
    found = compute_details(runs, [], WINDOW, DetailRules(), assumed_gpus=2.0)
    assert (found.recorded_gpu_hours, found.assumed_gpu_hours) == (16.0, 8.0)
    assert (found.recorded_runs, found.assumed_runs, found.runs_without_duration) == (1, 2, 1)
    total = values(*runs, assumed_gpus=2.0)["wandb.training.total_gpu_hours_24h"]
    assert total == found.recorded_gpu_hours + found.assumed_gpu_hours


def main_runs(*sps: float) -> list[FleetRun]:
    """Runs of main, oldest first, an hour apart."""
    return [
        run(MAIN, begun_h=index - len(sps), heard_h=0, sps={"overview/sps": value})
        for index, value in enumerate(sps)
    ]


@pytest.mark.parametrize(
    ("sps", "baseline", "change_pct", "regression"),
    [
        ([100, 110, 90, 85], 100, -15.0, True),
        ([100, 110, 90, 91], 100, -9.0, False),
        ([100, 110, 90, 150], 100, 50.0, False),
        ([100, 110, 90, 90], 100, -10.0, False),  # exactly what is allowed
        ([100, 100, 50], None, None, False),  # two are no baseline
        ([0, 0, 0, 5], 0, None, False),
        # Only the ten before it count: of those, the median is 50.
        ([*[1000] * 5, *[50] * 10, 46], 50, -8.0, False),
    ],
)
def test_regression(
    sps: list[float], baseline: float | None, change_pct: float | None, regression: bool
) -> None:
    """Main's newest run is compared with the median of those before it."""
    (found,) = compute_details(main_runs(*sps), [], WINDOW, DetailRules(), 1.0).throughput
    assert (found.latest, found.baseline) == (sps[-1], baseline)
    assert found.change_pct == (None if change_pct is None else pytest.approx(change_pct))
    assert found.regression is regression


def test_regression_of_main_alone() -> None:
    """Pull requests and unfinished runs are not compared; runs from before the window are."""
    earlier = [
        run(MAIN, begun_h=-90 + hour, heard_h=-80, sps={"overview/sps": 100.0}) for hour in range(3)
    ]
    newest = run(MAIN, begun_h=-4, sps={"overview/sps": 50.0})
    others = [
        run("github.sky.pr7.x", begun_h=-2, sps={"overview/sps": 100.0}),
        run(MAIN, "running", begun_h=-1, sps={"overview/sps": 100.0}),
        run(MAIN, "failed", begun_h=-1, sps={"overview/sps": 100.0}),
    ]
    found = compute_details([newest, *others], [*earlier, newest], WINDOW, DetailRules(), 1.0)
    (one,) = found.throughput
    assert (one.run, one.latest, one.baseline_runs) == (newest.name, 50.0, 3)
    assert found.regression


def test_silent_runs() -> None:
    """A run that claims to be running and was not heard of for more than an hour is named."""
    found = compute_details(
        [
            run("alive", "running", heard_h=-1),
            run("silent", "running", heard_h=-1.01),
            run("long silent", "running", begun_h=-90, heard_h=-80),
            run("never heard", "running", begun_h=None, heard_h=None),
            run("over", "crashed", heard_h=-5),
        ],
        [],
        WINDOW,
        DetailRules(),
        1.0,
    )
    assert [one.name for one in found.silent] == ["long silent", "silent", "never heard"]


def test_names_for_the_server() -> None:
    """A glob of names becomes a regular expression that the server understands."""
    assert main_regex("github.sky.main.*") == r"^github\.sky\.main\..*$"
    assert main_regex("a?c[de]") == r"^a.c.$"


def test_the_page_names_each_metric_and_its_source() -> None:
    """The collector's page lists exactly the 20 metrics, each with where it comes from."""
    page = (Path(__file__).parents[1] / "raywb" / "fleet" / "README.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `wandb.")]
    assert [row[1].strip(" `") for row in rows] == NAMES
    assert all(len(row) == 5 and row[2].strip() and row[3].strip() for row in rows)
