"""The service without Ray: the plain class in this process, real HTTP, the real W&B client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raywb.client import Client
from raywb.cluster import Cluster
from raywb.connection import Connection
from raywb.groups import Group
from raywb.orphans import sweep_node
from raywb.reports import Status, SweepReport
from raywb.rows import PROTOCOL
from raywb.service.actor import Boot, RaywbService
from raywb.service.sweeps import Nodes
from raywb.settings import Settings, explicit_settings
from raywb.shipping import Endpoint

CLUSTER = Cluster("c" * 56, "n" * 56, None)


class LocalService:
    """One service directory, and the incarnations of the service that work in it.

    Args:
        directory: the service's directory.
        make: makes an incarnation, in this process or in one of its own.
    """

    def __init__(self, directory: Path, make: Callable[..., Any] = RaywbService) -> None:
        self.directory = directory
        self.service: RaywbService | None = None
        self._make = make
        self._connections: list[Connection] = []

    def up(
        self, *, join_s: float = 20.0, nodes: Nodes | None = None, **settings: Any
    ) -> RaywbService:
        """Make the service, again after :meth:`down`, and wait until it listens."""
        boot = self.boot(self.directory, **settings)
        self.service = self._make(boot, nodes=nodes) if nodes is not None else self._make(boot)
        assert self.service.join(PROTOCOL, join_s)["address"]
        return self.service

    @staticmethod
    def boot(directory: Path, **settings: Any) -> Boot:
        """What a service in this directory is made with."""
        return Boot(
            directory=str(directory),
            cluster_id=CLUSTER.cluster_id,
            run_id="run00001",
            host="127.0.0.1",
            settings=Settings(mode="offline", **settings),
            group=Group("group", "the test"),
        )

    def start(self, *, api_key: str | None = None, **settings: Any) -> Any:
        """Open a run, or join the open one, and bring a key."""
        assert self.service is not None
        wanted = Settings(**{"mode": "offline", **settings})
        return self.service.start(
            wanted, explicit_settings(wanted), Group("group", "the test"), api_key
        )

    def down(self) -> None:
        """End this incarnation without ending its run."""
        assert self.service is not None
        self.service.close()
        self.service = None

    @property
    def endpoint(self) -> Endpoint:
        assert self.service is not None
        answer = self.service.join(PROTOCOL)
        return Endpoint(
            address=answer["address"], token=answer["token"], cluster_id=CLUSTER.cluster_id
        )

    def client(
        self,
        stage: str | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        strict: bool = False,
        cluster: Cluster = CLUSTER,
    ) -> Client:
        """A client as another process would have it, with a journal of its own."""
        assert self.service is not None
        connection = Connection(cluster, self.endpoint, 1)
        self._connections.append(connection)
        channel = connection.open_channel(stage, rank, world_size)
        run = self.service.join(PROTOCOL)["run"]
        return Client(connection, channel, stage, run, strict=strict)

    def sweep(self, timeout_s: float = 20.0) -> SweepReport:
        """What ``raywb.finish()`` does on a node."""
        bases = [path.parent for path in self.directory.parent.glob("journals/**/lock")]
        return sweep_node(
            sorted({base.parent for base in bases}), self.endpoint, time.monotonic() + timeout_s
        )

    def status(self) -> Status:
        assert self.service is not None
        return self.service.status()

    def wait_for(self, condition: Callable[[Status], bool], timeout_s: float = 30.0) -> Status:
        """Poll the status until it is as expected."""
        deadline = time.monotonic() + timeout_s
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {status}"
            time.sleep(0.05)
        return status

    def close(self) -> None:
        for connection in self._connections:
            if connection.shipper is not None:
                connection.shipper.stop()
        if self.service is not None:
            self.down()


@contextlib.contextmanager
def local_service(
    directory: Path, make: Callable[..., Any] = RaywbService
) -> Iterator[LocalService]:
    """A service directory under ``directory``; everything that was started in it is ended."""
    service = LocalService(directory / "service", make)
    try:
        yield service
    finally:
        service.close()
