"""Which names a server answers to. A web page whose own name is made to resolve to this machine (DNS rebinding) gets no
further than its Host header; it cannot send another."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import FenError
from server.errors import ApiError, echo, error_response

ANY = "*"
# Top-level names in which nobody can register one; containers call the machine they run on host.docker.internal.
LOCAL = ("localhost", "internal")
NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


class HostCheck:
    """Answers 421 unless the Host is an IP address, in LOCAL or one of `names`; in HTTP/1.0 there may be none."""

    def __init__(self, app: ASGIApp, names: Collection[str]):
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = next((value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"), None)
        if scope["type"] != "http" or given is None or self.answers_to(given):
            await self.app(scope, receive, send)
            return
        message = (
            f"this server does not answer to the name {echo(given)}; call it by IP address or as localhost, or start "
            "it with --allowed-hosts and that name"
        )
        await error_response(ApiError(421, message, code="unknown_host"))(scope, receive, send)

    def answers_to(self, given: str) -> bool:
        """`given`: a Host header, with a port or without."""
        host = re.sub(r":\d*$", "", given.strip()).lower().removesuffix(".")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        return ANY in self.names or host in self.names or host.split(".")[-1] in LOCAL or is_address(host)


def host_names(names: Sequence[str]) -> set[str]:
    """As HostCheck compares them. Raises FenError for what no Host header could say."""
    known = {name.lower().removesuffix(".") for name in names}
    for name in known:
        if name != ANY and not NAME.fullmatch(name):
            raise FenError(
                f"--allowed-hosts {name!r} is no host name; give names such as fen.example.org, or * for any"
            )
    return known


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
