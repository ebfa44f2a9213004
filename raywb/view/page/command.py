"""``raywb ui``: the page of a live service, or of what a run left in a directory."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from raywb.errors import DirectoryError, ServiceUnavailable, SettingsError
from raywb.reports import PageAddress
from raywb.settings import process_environment

if TYPE_CHECKING:
    from aiohttp import web

    from raywb.view.page.sources import PageSource

__all__ = ["addresses", "can_open_browser", "serve_directory", "ui"]

#: The port that is taken when it is free.
DEFAULT_PORT = 8650


def can_open_browser(environment: Mapping[str, str]) -> bool:
    """Whether there is a screen that a browser could appear on."""
    return bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def open_browser(url: str, *, wanted: bool | None) -> None:
    """Show an address in a browser: when asked to, or when there is a screen."""
    if wanted or (wanted is None and can_open_browser(process_environment())):
        webbrowser.open(url)


def serve_directory(
    directories: list[Path],
    *,
    host: str,
    port: int | None,
    tell: Callable[[str], None],
) -> None:
    """Serve the page of runs' directories until it is interrupted.

    Args:
        directories: the services' directories, those that are to be shown first first.
        host: address to listen on; a token is needed unless it is a loopback address.
        port: port to listen on; None is any.
        tell: is told the page's address, once it is served.

    Raises:
        OSError: the address cannot be listened on.
    """
    asyncio.run(_serve(directories, host, port, tell))


async def _serve(
    directories: list[Path],
    host: str,
    port: int | None,
    tell: Callable[[str], None],
) -> None:
    from raywb.view.page.sources import DirectorySource

    source = DirectorySource(directories)
    try:
        await source.begin()  # it reads while this process still loads what it serves with
        await _serve_source(source, host, port, tell)
    finally:
        await source.close()


async def _serve_source(
    source: PageSource, host: str, port: int | None, tell: Callable[[str], None]
) -> None:
    from aiohttp import web

    from raywb.view.page.application import Page, page_application
    from raywb.view.page.entitled import is_loopback_address

    loopback = host == "localhost" or is_loopback_address(host)
    token = None if loopback else secrets.token_urlsafe(32)
    page = Page(source, mode=lambda: "loopback" if loopback else "network", token=token)
    runner = web.AppRunner(page_application(page), access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        site = await _listen(runner, host, port)
        shown = socket.gethostname() if host in ("0.0.0.0", "::") else host
        shown = f"[{shown}]" if ":" in shown else shown
        query = f"?token={token}" if token else ""
        tell(f"http://{shown}:{site}/{query}")
        await _interrupted()
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int | None) -> int:
    """Listen on the port, or without one on the usual one if it is free; returns the port."""
    from aiohttp import web

    wanted = [DEFAULT_PORT, 0] if port is None else [port]
    for number in wanted:
        site = web.TCPSite(runner, host, number)
        try:
            await site.start()
        except OSError:
            if number == wanted[-1]:
                raise
            continue
        break
    return int(runner.addresses[0][1])


async def _interrupted() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        await ended.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):
                loop.remove_signal_handler(number)


def _show_live(wanted: bool | None) -> None:
    from raywb.cli import _connect
    from raywb.lifecycle import page_address

    _connect()
    page = page_address()
    lines, url = addresses(page, socket.gethostname())
    click.echo("\n".join(lines))
    if url is not None:
        open_browser(url, wanted=wanted)


def addresses(page: PageAddress, hostname: str) -> tuple[list[str], str | None]:
    """What a person on this machine is told of a live service's page.

    Args:
        page: what the service says.
        hostname: this machine's.

    Returns:
        Lines, and the address that can be opened from here.

    Raises:
        SettingsError: the page is switched off.
        ServiceUnavailable: it has no port.
    """
    if page.mode == "off":
        raise SettingsError(
            "the page is switched off (ui=off): start the run with ui='loopback' or 'network'"
        )
    if page.mode == "network" and page.token is not None:
        url = f"http://{page.address}/?token={page.token}"
        return [f"raywb: the page, for whoever has this address:\n\n    {url}\n"], url
    port = page.loopback_port
    if port is None:
        raise ServiceUnavailable(
            "the page has no port on the head node's loopback: all were taken when the service "
            "began. Start the run with ui='network'"
        )
    url = f"http://localhost:{port}/"
    if page.hostname == hostname:
        return [f"raywb: the page, for whoever is on this machine:\n\n    {url}\n"], url
    return [
        f"raywb: the page answers on the head node only. Forward its port\n\n"
        f"    ssh -N -L {port}:127.0.0.1:{port} {page.hostname}\n\n"
        f"and open\n\n    {url}\n"
    ], None


@click.command()
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, help=f"Port to listen on; by default {DEFAULT_PORT} if free.")
@click.option("--open/--no-open", "wanted", default=None, help="Show it in a browser.")
def ui(directory: Path | None, host: str, port: int | None, wanted: bool | None) -> None:
    """Show runs in a web page: training, pipelines, nodes, delivery.

    DIRECTORY is a run's (what start() printed as dir) or one that holds several: it is read and
    left as it is, and no Ray is needed. Without it, the address of the live service's page is
    printed.
    """
    if directory is None:
        _show_live(wanted)
        return

    from raywb.view.page.sources import find_directories

    try:
        directories = find_directories(directory.absolute())
    except OSError as error:
        raise DirectoryError(f"{directory} cannot be read: {error.strerror or error}") from error

    def tell(url: str) -> None:
        more = f" and {len(directories) - 1} more" if len(directories) > 1 else ""
        click.echo(f"raywb: showing {directories[0]}{more}\n\n    {url}\n\nCtrl-C ends it.")
        open_browser(url, wanted=wanted)

    try:
        serve_directory(directories, host=host, port=port, tell=tell)
    except OSError as error:
        raise click.ClickException(
            f"{host} cannot be listened on ({error.strerror or error}): choose another --port"
        ) from error
