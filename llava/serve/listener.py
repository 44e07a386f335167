"""Where the server listens, and how it ends: what was begun is answered first."""

import asyncio
import signal
import socket
import sys
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from llava.errors import InputError
from llava.serve.limits import Gate
from llava.signals import Stopped

KEEP_ALIVE_SECONDS = 65
"""Longer than clients and proxies keep an idle connection: they close it, and no request meets a closed one."""
CUT_SECONDS = 2
"""How long requests that are cut off may take to notice."""


def bind(host: str, port: int) -> socket.socket:
    """Take an address without listening yet: a port that is taken is told before a model is loaded.

    Raises:
        InputError: it is taken, or not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio sends at once only on sockets that say that they are TCP; else short pieces wait for each other.
        door = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; choose another address") from None
    return door


def announce(door: socket.socket, title: str) -> None:
    """Write the line that says where clients connect to."""
    host, port = door.getsockname()[:2]
    sys.stdout.write(f"{title} at http://{f'[{host}]' if ':' in host else host}:{port}/v1\n")
    sys.stdout.flush()


class Listener(uvicorn.Server):
    """An HTTP server that SIGTERM or Ctrl-C ends, once it has answered; the same signal again ends it at once."""

    def __init__(self, app: ASGIApp, gate: Gate, *, title: str, drain_seconds: float, has_access_log: bool):
        """Take what is served.

        Args:
            app: answers.
            gate: of the requests that are answered before the end.
            title: begins the line that says where the server is.
            drain_seconds: how long the end waits for answers.
            has_access_log: whether each request is written as a line.
        """
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="info" if has_access_log else "warning",
            access_log=has_access_log,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CUT_SECONDS,
        )
        super().__init__(config)
        self._gate = gate
        self._title = title
        self._drain_seconds = drain_seconds
        self._drain: asyncio.Task | None = None
        self._cut_by: int | None = None

    async def listen(self, door: socket.socket) -> None:
        """Serve until a signal comes.

        Args:
            door: a bound socket; it is closed afterwards.

        Raises:
            Stopped: requests were cut off.
        """
        self._loop = asyncio.get_running_loop()
        await self.serve(sockets=[door])
        if self._cut_by is not None:
            raise Stopped(self._cut_by)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        announce(sockets[0], self._title)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end; uvicorn calls this where a signal comes."""
        self._loop.call_soon_threadsafe(self._end, sig)

    def _end(self, number: int) -> None:
        if self._drain is None:
            self._drain = asyncio.create_task(self._finish(number))
        else:
            self._cut_by = number
            self.should_exit = self.force_exit = True

    async def _finish(self, number: int) -> None:
        """Refuse new requests, wait for those in the house, and end."""
        try:
            async with asyncio.timeout(self._drain_seconds):
                await self._gate.drain()
        except TimeoutError:
            sys.stderr.write(f"{signal.Signals(number).name}: {self._gate.num_admitted} requests are cut off\n")
            self._cut_by = number
        self.should_exit = True
