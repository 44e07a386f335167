"""One server per accelerator behind one address: each connection goes to the server that has the fewest.

    python -m llava.serve.api --model-path CKPT --port 8000 --data-parallel 2

starts two servers, at the ports 8001 and 8002 of this machine, each with an accelerator of its own, and passes bytes
between them and the connections to port 8000. A client that keeps its connections stays at its servers, where its
images are cached. Each server has its own `/metrics`.
"""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from llava.errors import InputError
from llava.serve.listener import announce
from llava.signals import PARENT_VARIABLE, Stopped

LOCALHOST = "127.0.0.1"
DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
POLL_SECONDS = 0.2
CHUNK_BYTES = 2**16


@dataclass(eq=False)
class Worker:
    """One server.

    Attributes:
        port: where it listens.
        process: that it runs in.
        num_connections: that are passed to it now.
    """

    port: int
    process: Process
    num_connections: int = 0


def run_workers(
    arguments: Sequence[str], door: socket.socket, num_workers: int, num_devices: int, device: str | None
) -> None:
    """Start the servers, and pass connections to them until a signal comes and all have ended.

    Args:
        arguments: of the command; each server gets them with an address of its own.
        door: bound to the address of all.
        num_workers: servers.
        num_devices: accelerators of each.
        device: option of the command.

    Raises:
        InputError: there are too few accelerators, or a server ended.
        Stopped: a server had to cut off requests.
    """
    if sys.platform == "win32":
        raise InputError("--data-parallel: not on Windows; start a server per port, and share the clients out")
    environments = share_devices(num_workers, num_devices, device)
    asyncio.run(_Dealer(arguments, door, environments).run())


def share_devices(num_workers: int, num_devices: int, device: str | None) -> list[dict[str, str]]:
    """Return the environment variables of each server that give it accelerators of its own; none on the CPU.

    Raises:
        InputError: there are too few.
    """
    if device == "cpu":
        return [{} for _ in range(num_workers)]
    if device not in (None, "cuda"):
        raise InputError(f"--device {device} names one accelerator: with --data-parallel each server has its own")
    names = [name for name in os.environ.get(DEVICES_VARIABLE, "").split(",") if name] or _list_devices()
    if len(names) < num_workers * num_devices:
        raise InputError(
            f"--data-parallel {num_workers}: {num_workers * num_devices} accelerators are needed, "
            f"there are {len(names)}; --device cpu runs the servers on the CPU"
        )
    starts = range(0, num_workers * num_devices, num_devices)
    return [{DEVICES_VARIABLE: ",".join(names[start : start + num_devices])} for start in starts]


def _list_devices() -> list[str]:
    import torch

    return [str(number) for number in range(torch.accelerator.device_count())]


class _Dealer:
    """Starts the servers, passes connections, and ends everything together."""

    def __init__(self, arguments: Sequence[str], door: socket.socket, environments: Sequence[dict[str, str]]):
        self._arguments = arguments
        self._door = door
        self._environments = environments
        self._workers: list[Worker] = []
        self._stopped_by: int | None = None

    async def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)
        try:
            # 1. All servers load at the same time.
            for environment in self._environments:
                await self._start(environment)
            ends = [asyncio.create_task(worker.process.wait()) for worker in self._workers]
            if await self._are_ready():
                # 2. Serve until a signal comes or a server ends. Then all end; nothing is restarted here.
                server = await asyncio.start_server(self._pass_on, sock=self._door)
                announce(self._door, f"{len(self._workers)} servers")
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                server.close()
            codes = await self._end(ends)
        finally:
            for worker in self._workers:
                with suppress(ProcessLookupError):
                    worker.process.kill()
        if self._stopped_by is None:
            raise InputError(f"a server has ended, and with it all: exit codes {codes}; its own lines say why")
        if any(codes):
            raise Stopped(self._stopped_by)

    async def _start(self, environment: dict[str, str]) -> None:
        port = self._door.getsockname()[1] + len(self._workers) + 1
        # The last of several values of an option counts.
        own = ["--data-parallel", "1", "--host", LOCALHOST, "--port", str(port)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llava.serve.api", *self._arguments, *own),
            env={**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,  # Ctrl-C reaches it by way of this process alone
        )
        self._workers.append(Worker(port, process))

    async def _are_ready(self) -> bool:
        """Wait until all servers listen; False if one has ended before."""
        for worker in self._workers:
            while not await self._is_listening(worker):
                if any(each.process.returncode is not None for each in self._workers):
                    return False
                await asyncio.sleep(POLL_SECONDS)
        return True

    async def _is_listening(self, worker: Worker) -> bool:
        try:
            _, writer = await asyncio.open_connection(LOCALHOST, worker.port)
        except OSError:
            return False
        writer.close()
        return True

    def _stop(self, number: int) -> None:
        """Pass a signal on; the second one makes the servers end at once."""
        self._stopped_by = number
        for worker in self._workers:
            with suppress(ProcessLookupError):
                worker.process.send_signal(number)

    async def _end(self, ends: Sequence[asyncio.Task]) -> list[int]:
        """End all servers and return their exit codes."""
        if self._stopped_by is None:
            for worker in self._workers:
                with suppress(ProcessLookupError):
                    worker.process.terminate()
        return await asyncio.gather(*ends)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on, until either side closes it."""
        worker = min(self._workers, key=lambda each: each.num_connections)
        worker.num_connections += 1
        try:
            inner_reader, inner_writer = await asyncio.open_connection(LOCALHOST, worker.port)
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))
        except OSError:  # the server ends: the client sees a closed connection
            pass
        finally:
            worker.num_connections -= 1
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on, and at their end close the other side."""
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    except OSError:  # one side is gone: the other is closed
        pass
    finally:
        writer.close()
