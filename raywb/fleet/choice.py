"""Which outlets a user chose, and the making of them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from raywb.errors import SettingsError
from raywb.fleet.outlets import DatadogOutlet, FileOutlet, Outlet, RayOutlet
from raywb.fleet.scrape import ScrapeOutlet

__all__ = ["OutletChoice", "make_outlets", "parse_address"]

#: A report is shown for so many intervals, should no newer one come.
FRESH_INTERVALS = 2.5


class OutletChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Where the metrics are to go.

    Attributes:
        datadog: push them to Datadog.
        tags: further tags there.
        serve: host and port to be scraped at.
        openmetrics: file to write.
        ray_metrics: set them as ``ray.util.metrics``.
    """

    datadog: bool = False
    tags: tuple[str, ...] = ()
    serve: tuple[str, int] | None = None
    openmetrics: str | None = None
    ray_metrics: bool = False


def make_outlets(choice: OutletChoice, interval_s: float) -> list[Outlet]:
    """The outlets that were chosen.

    Raises:
        SettingsError: the address to be scraped at cannot be listened on.
    """
    outlets: list[Outlet] = []
    if choice.datadog:
        outlets.append(DatadogOutlet(choice.tags))
    if choice.serve is not None:
        host, port = choice.serve
        try:
            outlets.append(ScrapeOutlet(host, port, fresh_s=FRESH_INTERVALS * interval_s))
        except OSError as error:
            raise SettingsError(
                f"serve={host}:{port} cannot be listened on ({error}): take another port"
            ) from error
    if choice.openmetrics is not None:
        outlets.append(FileOutlet(Path(choice.openmetrics)))
    if choice.ray_metrics:
        outlets.append(RayOutlet())
    return outlets


def parse_address(text: str) -> tuple[str, int]:
    """``9469``, ``:9469`` or ``0.0.0.0:9469`` as host and port; without a host, the loopback's.

    Raises:
        SettingsError: it is no such text.
    """
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise SettingsError(
            f"serve={text!r} cannot be used: it is a port, or an address and a port, as in "
            "0.0.0.0:9469"
        )
    return host or "127.0.0.1", int(port)
