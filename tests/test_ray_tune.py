"""Ray Tune's callback against a service that cannot be had, without a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from local_service import CLUSTER

from raywb.client import Client
from raywb.connection import Connection
from raywb.errors import ServiceUnavailable
from raywb.reports import RunInfo

pytest.importorskip("tensorboardX", reason="ray[train] is not installed")


class Service:
    """What ``attach_own_run`` finds: nothing, until it is there."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.is_there = False
        self.asked: list[float] = []

    def attach(self, stage: str, *, run_id: str, name: str, timeout_s: float) -> Client:
        self.asked.append(timeout_s)
        if not self.is_there:
            raise ServiceUnavailable("no answer")
        run = RunInfo(project="p", id=run_id, name=name, mode="offline", dir="")
        channel = self.connection.open_channel(stage, None, None, own_run=(1000, 1))
        return Client(self.connection, channel, stage, run)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path))
    connection = Connection(CLUSTER, None, 1)
    service = Service(connection)
    monkeypatch.setattr("raywb.ray_tune.attach_own_run", service.attach)
    yield service
    connection.close(0.1)


def trial(name: str, **resources: float) -> Any:
    from ray.tune.execution.placement_groups import PlacementGroupFactory

    factory = PlacementGroupFactory([resources or {"CPU": 1}])
    return SimpleNamespace(
        trial_id=name, config={"lr": 1}, placement_group_factory=factory, checkpoint=None
    )


def test_trials_share_one_pause(service: Service) -> None:
    """A service that hangs holds Tune's loop up once for a moment, however many trials there are.

    Reports are lost meanwhile, and nothing else; also those of trials that ended are told.
    """
    from raywb.ray_tune import RaywbCallback

    callback = RaywbCallback()
    trials = [trial(f"trial{number}") for number in range(20)]
    for one in trials:
        callback.log_trial_start(one)
        callback.log_trial_result(1, one, {"score": 1.0})
        callback.log_trial_save(one)
    callback.log_trial_end(trials[0])
    callback.on_experiment_end(trials)
    assert len(service.asked) == 1
    assert service.asked[0] <= 3.0
    assert callback._attempts.missed == 20
    service.is_there = True
    callback._attempts._not_before = 0.0
    callback.log_trial_result(2, trials[1], {"score": 2.0})
    assert service.connection.lost == {"not_attached": 20}
    callback.log_trial_result(2, trials[2], {"score": 2.0})
    assert service.connection.lost == {"not_attached": 20}
    assert len(service.asked) == 3


def test_a_run_says_what_its_trial_has(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs and GPUs in the config are those that Ray gives the trial."""
    from raywb.ray_tune import RaywbCallback

    said: dict[str, Any] = {}
    monkeypatch.setattr("raywb.run_values.Config.update", lambda self, values: said.update(values))
    service.is_there = True
    RaywbCallback().log_trial_start(trial("trial", CPU=2, GPU=0.5))
    assert said == {"compute.cpu_count": 2, "compute.gpu_count": 0.5, "lr": 1}
