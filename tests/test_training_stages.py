"""SPEC E: stages whose steps come interleaved, late and out of order keep all their points."""

from __future__ import annotations

import random

import pytest
from local_service import LocalService
from wandb_file import read_runs

STAGES = ("training/operator", "training/diffusion_residual", "training/consistency_distill")


@pytest.mark.parametrize("interrupted", [False, True], ids=["", "with a restart"])
def test_every_stage_keeps_its_points_on_its_own_axis(
    service: LocalService, interrupted: bool
) -> None:
    """Read back from W&B's file: each value at its step, once, and each metric on its axis."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    choose = random.Random(seed)
    service.up()
    service.start()
    #: What each stage logs: steps out of order, some far behind, in two processes.
    rows = {
        stage: choose.sample([(step, float(step) + number) for step in range(0, 4000, 100)], 40)
        for number, stage in enumerate(STAGES)
    }
    clients = {stage: [service.client(stage), service.client(stage)] for stage in STAGES}
    turns = [stage for stage in STAGES for _ in rows[stage]]
    choose.shuffle(turns)
    left = {stage: list(pairs) for stage, pairs in rows.items()}
    for count, stage in enumerate(turns):
        step, loss = left[stage].pop()
        client = clients[stage][step // 100 % 2]
        client.log({"loss": loss, "nested": {"lr": step / 10}}, step=step)
        if choose.random() < 0.1:
            client.flush()
        if interrupted and count == len(turns) // 2:
            assert client.flush()
            service.down()
            service.up()
            for one in clients.values():
                for other in one:
                    other._connection.use(service.endpoint, 1)
    late = clients[STAGES[0]][0]
    late.log({"loss": -1.0}, step=50)  # long after everything else
    for one in clients.values():
        for client in one:
            assert client.flush()
    assert service.service is not None
    report = service.service.finish(60.0, 0)
    assert (report.complete, report.delivered_rows) == (True, 121)
    rows[STAGES[0]].append((50, -1.0))

    run = read_runs(service.directory)["run00001"]
    for stage in STAGES:
        found = [
            (row[f"{stage}/step"], row[f"{stage}/loss"])
            for row in run.history
            if f"{stage}/loss" in row
        ]
        assert sorted(found) == sorted(rows[stage])
        assert run.metrics[f"{stage}/*"].step_metric == f"{stage}/step"
        #: A row of one stage says nothing of another's axis.
        mixed = [row for row in run.history if f"{stage}/loss" in row]
        others = [f"{other}/step" for other in STAGES if other != stage]
        assert not any(key in row for row in mixed for key in others)
    #: W&B's own counter is the sink's alone: without gaps, whatever the users' steps are.
    assert run.steps == list(range(len(run.history)))


def test_a_stage_within_another_keeps_its_axis(service: LocalService) -> None:
    """``training`` and ``training/operator`` are two stages, each with its own step."""
    service.up()
    service.start()
    outer, inner = service.client("training"), service.client("training/operator")
    for step in range(5):
        inner.log({"loss": step / 10}, step=100 + step)
        outer.log({"loss": float(step)}, step=4 - step)
    assert outer.flush()
    assert inner.flush()
    assert service.service is not None
    assert service.service.finish(60.0, 0).complete
    run = read_runs(service.directory)["run00001"]
    pairs = {
        stage: {(row[f"{stage}/step"], row[f"{stage}/loss"]) for row in run.history
                if f"{stage}/loss" in row}
        for stage in ("training", "training/operator")
    }  # fmt: skip
    assert pairs["training"] == {(4 - step, float(step)) for step in range(5)}
    assert pairs["training/operator"] == {(100 + step, step / 10) for step in range(5)}

    def axis(key: str) -> str | None:
        named = run.metrics.get(key)
        if named is not None:
            return named.step_metric
        globs = [name for name in run.metrics if name.endswith("*") and key.startswith(name[:-1])]
        return run.metrics[max(globs, key=len)].step_metric

    assert axis("training/loss") == "training/step"
    assert axis("training/operator/loss") == "training/operator/step"
