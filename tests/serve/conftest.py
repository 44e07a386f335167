"""The pocket model, an engine whose answers are known beforehand, and servers on free ports."""

import asyncio
import socket
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from llava import Llava
from llava.serve.engine import Piece, TokenLogprob
from playground.shapes.world import draw_scene

# The server is an extra, and so is the client that asks it here.
SERVER = ("fastapi", "uvicorn", "prometheus_client", "openai")
collect_ignore = [] if all(map(find_spec, SERVER)) else ["test_api.py", "test_api_process.py"]
ROOT = Path(__file__).parents[2]
POCKETS = ROOT / "playground/shapes/checkpoints"
POCKET = POCKETS / "llava-shapes-trim"


class Scribe:
    """Writes `max_new_tokens` words about each prompt: how long it is, and then numbers.

    Attributes:
        seconds: between words.
        fault: raised in place of the third word.
        num_open: answers that are being written.
        num_closed: answers that were closed before their end.
    """

    name, max_positions = "scribe", 1000

    def __init__(self, seconds=0.0, fault=None):
        self.seconds, self.fault = seconds, fault
        self.num_open = self.num_closed = 0
        self.searches = []

    async def start(self):
        """Be ready."""

    def count_waiting(self):
        """Nobody waits."""
        return 0

    async def answer(self, prompt, search):
        """Write."""
        self.searches.append(search)
        self.num_open += 1
        is_done = False
        count = search.sampling.max_new_tokens
        try:
            for number in range(count):
                await asyncio.sleep(self.seconds)
                if number == 2 and self.fault:
                    raise self.fault
                word = f"{prompt.num_tokens} positions" if number == 0 else f" {number}"
                reason = "length" if number == count - 1 else None
                is_done = reason is not None
                logprobs = ()
                if search.num_logprobs is not None:
                    top = tuple((each, f" {each}", -1.0 - each) for each in range(search.num_logprobs))
                    logprobs = (TokenLogprob(number, word, -0.5, top),)
                yield Piece(word, (number,), logprobs, reason)
        finally:
            self.num_open -= 1
            self.num_closed += not is_done

    async def close(self):
        """Be done."""


@contextmanager
def serve_in_thread(front, engine, keys=(), max_pixels=10**6, max_new_tokens=64, files=None, private=False, **limits):
    """Serve in a thread; yields the address and the `Completions`."""
    from llava.serve.app import Completions, make_app
    from llava.serve.limits import Limits
    from llava.serve.listener import Listener, bind
    from llava.serve.remote_images import ImageReader

    reader = ImageReader(max_pixels, files, private)
    completions = Completions(
        front, engine, "pocket", limits=Limits(**limits), reader=reader, max_new_tokens=max_new_tokens
    )
    app = make_app(completions, keys, max_model_len=engine.max_positions)
    door = bind("127.0.0.1", 0)
    address = door.getsockname()
    listener = Listener(app, completions.gate, title="pocket", drain_seconds=5, has_access_log=False)

    async def run():
        await engine.start()
        try:
            await listener.listen(door)
        finally:
            await engine.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    wait_for(lambda: is_open(address))
    try:
        yield f"http://{address[0]}:{address[1]}", completions
    finally:
        listener.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def is_open(address):
    """Whether something listens."""
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def wait_for(holds, seconds=20):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def llava():
    """The pocket model that was trained on all patches, with TRIM."""
    return Llava.from_pretrained(POCKETS / "llava-shapes", reduce="TRIM:-1", device="cpu")


@pytest.fixture(scope="module")
def images():
    """Eight images."""
    return [draw_scene(1, 2, number)[0] for number in range(8)]


@pytest.fixture(scope="session")
def pocket():
    """The pocket model of shapes, with its own TRIM."""
    return Llava.from_pretrained(POCKET, device="cpu")


@pytest.fixture(scope="session")
def scribe_class():
    """The engine of these tests."""
    return Scribe


@pytest.fixture(scope="session")
def serving():
    """`serve_in_thread`."""
    return serve_in_thread


@pytest.fixture(scope="session")
def waiting():
    """`wait_for`."""
    return wait_for
