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

#: Of Ray's many variables, those that say where a cluster is and which job this would be.
_WHERE = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


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
