"""What all tests share: an environment that says nothing, and a Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# So that a failure in them shows both sides, as it does in a test.
pytest.register_assert_rewrite("online_service", "left_behind", "ray_cluster", "local_service")

from local_service import LocalService, local_service  # noqa: E402
from ray_cluster import FOREIGN, RayCluster, SharedCluster  # noqa: E402
from vast_server import VastServer  # noqa: E402

#: Of Ray's many variables, those that say where a cluster is and which job this would be.
_WHERE = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


#: Files that take longer than 20 s without a cluster of Ray; see pytest_collection_modifyitems.
LONG = (
    *("test_wandb_misbehaves", "test_service", "test_recipe_data_prep", "test_fleet_wandb"),
    *("test_recipe_sft_data_prep", "test_killed_online", "test_layout", "test_sync", "test_owner"),
    *("test_recover", "test_slurm", "test_cluster_yaml", "test_training_run_record"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Several processes take the files in the order that is set here, not by number of tests."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first, so that no process is left with one when all are done."""
    long = {item.path for item in items if item.get_closest_marker("ray")}
    items.sort(key=lambda item: item.path not in long and item.path.stem not in LONG)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_arrives() -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that a test starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nobody's W&B key, run id, Slurm job or Ray address decides how a test ends."""
    for name in list(os.environ):
        if name in _WHERE or name.startswith(FOREIGN):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    """A service's directory, without Ray; the test brings the service up."""
    monkeypatch.setenv("RAYWB_JOURNAL_DIR", str(tmp_path / "journals"))
    with local_service(tmp_path) as local:
        yield local


@pytest.fixture
def vast() -> Iterator[VastServer]:
    """Vast.ai's stand-in, which says at the end what it was asked wrongly."""
    with VastServer() as server:
        yield server
        assert server.unexpected == []


@pytest.fixture(scope="session")
def _shared_cluster() -> Iterator[SharedCluster]:
    shared = SharedCluster()
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def cluster(_shared_cluster: SharedCluster) -> Iterator[RayCluster]:
    """A cluster that a module's tests share; ``finish`` and ``start`` part their runs."""
    with _shared_cluster.lent() as lent:
        yield lent
