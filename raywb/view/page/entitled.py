"""Who may see the page: whoever sits at this machine, or shows the view token.

Who comes through a loopback socket needs no token, but has to call the page by a loopback name:
another site's page, which a browser on this machine shows, cannot (DNS rebinding). Who comes by
another address shows the view token, once in the address and then as a cookie, or as a bearer
token. It is not the token that sources send with.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable

from aiohttp import web

__all__ = ["Entitled", "Refused", "is_loopback_address"]


class Refused(Exception):
    """The request is answered with an error, in one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Entitled:
    """Those who are let in.

    Args:
        mode: who that is at present: ``loopback``, ``network`` (with the token) or ``off``.
        token: the view token; None lets nobody in by another address than loopback.
    """

    def __init__(self, mode: Callable[[], str], token: str | None) -> None:
        self._mode = mode
        self._token = token

    def check(self, request: web.Request) -> None:
        """Raises :class:`Refused` for whoever is not entitled."""
        mode = self._mode()
        if mode == "off":
            raise Refused(404, "the page is switched off (setting ui)")
        if self._shows_token(request) and (mode == "network" or _is_local(request)):
            return
        if _is_local(request):
            if _is_loopback_name(request.host):
                return
            raise Refused(
                403, "on this machine the page answers to the names localhost and 127.0.0.1 only"
            )
        if mode == "network":
            raise Refused(401, "open the address that `raywb ui` prints: it holds a token")
        raise Refused(
            403,
            "the page answers on the head node only: forward its port, or set ui=network",
        )

    def remember(self, request: web.Request, response: web.Response) -> None:
        """Give a cookie to whoever has shown the token."""
        if self._token is not None and self._shows_token(request):
            response.set_cookie(
                _cookie(request), self._token, httponly=True, samesite="Lax", path="/"
            )

    def _shows_token(self, request: web.Request) -> bool:
        if self._token is None:
            return False
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        shown = [bearer, request.query.get("token", ""), request.cookies.get(_cookie(request), "")]
        token = self._token.encode()
        return any(
            hmac.compare_digest(one.encode("utf-8", "surrogateescape"), token) for one in shown
        )


def _is_local(request: web.Request) -> bool:
    """Whether the connection came through a loopback socket."""
    name = request.get_extra_info("sockname")
    return bool(name) and is_loopback_address(str(name[0]))


def is_loopback_address(host: str) -> bool:
    """Whether this is an address of the machine's loopback, also one inside of IPv6."""
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_loopback_name(host: str) -> bool:
    """Whether a Host header names this machine's loopback, with any port or none."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(:[0-9]{1,5})?", host)
    if match is None:
        return False
    name = match[1].strip("[]").lower()
    return name == "localhost" or is_loopback_address(name)


def _cookie(request: web.Request) -> str:
    """The cookie's name; cookies of all ports of a host lie together."""
    name = request.get_extra_info("sockname")
    return f"raywb_view_{name[1] if name else 0}"
