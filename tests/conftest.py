"""Fixtures that several test modules share: the recorded checkpoints and how to load them."""

import os
import tempfile
from pathlib import Path

import pytest

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
