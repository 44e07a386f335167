"""Fixtures that several test modules share: the recorded checkpoints and how to load them."""

import os
from pathlib import Path

import pytest

if "LLAVA_TEST_DEVICE" in os.environ:
    # Tests that read this compute there instead of on the CPU; float32 is then float32 in convolutions as well.
    import torch

    torch.backends.cudnn.allow_tf32 = False

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
