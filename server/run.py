"""Run the server: claim the port, load in the background, drain on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import resource
import socket
from types import FrameType

import h11
import uvicorn
from rich.console import Console
from uvicorn.protocols.http.h11_impl import H11Protocol

from bench.prices import parse_price
from engine.checkpoint import open_checkpoint
from engine.core.client import EngineClient
from engine.errors import FenError
from server.app import create_app
from server.banner import print_banner
from server.errors import ApiError, error_response
from server.keys import read_keys
from server.logs import log, logging_to
from server.service import Service
from server.settings import MAX_HEAD_BYTES, ServerSettings


def serve(settings: ServerSettings) -> None:
    """Returns after a signal, when everything in flight is answered. Raises FenError when it cannot run at all."""
    if settings.price is not None:
        parse_price(settings.price)  # refused before anything is loaded
    raise_file_limit()
    console = Console(stderr=True)
    with (
        logging_to(settings.log_file, settings.log_format) as writer,
        claim_port(settings.host, settings.port) as listener,
    ):
        keys = read_keys(settings.api_key_file, os.environ)
        checkpoint = open_checkpoint(settings.engine.model, settings.engine.load_format)
        client = EngineClient(settings.engine)
        failure: FenError | None = None

        async def start() -> None:
            nonlocal failure
            try:
                with console.status("Loading") as status:
                    info = await client.start(lambda stage, share: status.update(f"Loading: {stage}, {share:.0%}"))
            except FenError as error:
                failure, server.should_exit = error, True
            else:
                host, port = listener.getsockname()[:2]
                print_banner(console, info, service, host, port)
                seconds = round(info.load_seconds, 3)
                fields = {"model": service.model, "host": host, "port": port, "load_seconds": seconds}
                fields |= {"stages": {name: round(of_stage, 3) for name, of_stage in info.stages}}
                log.info("ready", extra={"fields": fields})

        app = create_app(
            client,
            checkpoint.tokenizer,
            settings,
            chat_template=checkpoint.chat_template,
            model=checkpoint.name,
            start=start,
            keys=keys,
            loopback=ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback,
        )
        service: Service = app.state.service
        service.log = writer
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            http=Http,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ws="none",
            timeout_keep_alive=75,  # longer than clients keep a connection, so that they close it first
            timeout_graceful_shutdown=2,
        )
        server = Server(config, service, console)
        server.run(sockets=[listener])
        if failure is not None:
            raise failure


class Http(H11Protocol):
    """uvicorn's, by the parser that bounds what it reads of a head; what is no HTTP gets an error as all others."""

    def send_400_response(self, msg: str) -> None:
        message = f"this is no HTTP request that can be read, or its head has more than {MAX_HEAD_BYTES // 2**10} KiB"
        reply = error_response(ApiError(400, message))
        head = h11.Response(status_code=400, headers=[*reply.raw_headers, (b"connection", b"close")])
        for event in (head, h11.Data(data=bytes(reply.body)), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn with our signals: the first drains while the port stays open, the second ends what runs, the third does
    not wait for that. Exit status 0."""

    def __init__(self, config: uvicorn.Config, service: Service, console: Console):
        super().__init__(config)
        self.service = service
        self.console = console
        self.drainers: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.loop.call_soon_threadsafe(self.begin_exit)

    def begin_exit(self) -> None:
        if len(self.drainers) == 2:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would say what each task was doing
            self.should_exit = self.force_exit = True
            return
        for drainer in self.drainers:
            drainer.cancel()
        self.drainers.append(
            asyncio.create_task(self.drain(0 if self.drainers else self.service.settings.drain_timeout))
        )

    async def drain(self, seconds: float) -> None:
        log.info("draining", extra={"fields": {"completions": self.service.admitted, "seconds": seconds}})
        if self.service.admitted and seconds:
            completions = "1 completion" if self.service.admitted == 1 else f"{self.service.admitted} completions"
            self.console.print(f"Finishing {completions}, for at most {seconds:g} s; a second signal stops now.")
        await self.service.drain(seconds)
        self.should_exit = True


def raise_file_limit() -> None:
    """As many sockets as the system lets this user have: every connection is one, and the usual 1,024 are soon used."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS calls it unlimited and takes no such number
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def claim_port(host: str, port: int) -> socket.socket:
    """A bound socket, not yet listening. Raises FenError with the way out."""
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        if listener is not None:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            hint = f"is in use by another program; stop it, or choose another port: --port {port + 1}"
        elif error.errno == errno.EACCES:
            hint = "may not be opened by this user; choose a port above 1023: --port 8000"
        else:
            hint = f"cannot be opened ({error.strerror}); check --host and --port"
        raise FenError(f"port {port} on {host} {hint}") from None
