"""Fixtures that several test modules share: the recorded checkpoints and how to load them."""

from pathlib import Path

import pytest

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
