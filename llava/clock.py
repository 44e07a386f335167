"""Time named stages of work on any device, with the device drained before and after each."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all its work; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class StageClock:
    """Adds up the time of named stages; the device is drained before and after each."""

    def __init__(self, device: torch.device):
        """Start at zero.

        Args:
            device: where the work runs.
        """
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call, and start at zero again."""
        taken, self.seconds = self.seconds, {}
        return taken
