"""Fixtures that several test modules share: the recorded checkpoints and how to load them."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.file_server import Server, serving

if "LLAVA_TEST_DEVICE" in os.environ:
    # Tests that read this compute there instead of on the CPU; float32 is then float32 in convolutions as well.
    import torch

    torch.backends.cudnn.allow_tf32 = False

# A shell starts background jobs with Ctrl-C ignored, nohup its command with a hangup ignored, and what they start
# inherits that. The tests that send a command a signal state what it does where the signal reaches it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Hashes of the tests' files stay out of the user's cache; commands that tests start inherit it.
CACHE = tempfile.TemporaryDirectory(prefix="llava-cache-")
os.environ["LLAVA_CACHE"] = CACHE.name

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of numbers recorded from the published code."""
    return GOLDEN


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recorded tiny checkpoints, as working directory: their `mm_vision_tower` is relative to it."""
    folder = GOLDEN / "checkpoints"
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of files on this machine; a download's tries follow one another at once."""
    monkeypatch.setattr("llava.download.transfer.FIRST_WAIT_SECONDS", 0.0)
    with serving() as server:
        yield server
