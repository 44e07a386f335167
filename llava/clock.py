"""Time named parts of work on any device: with the device drained around each, or without any wait."""

import time
from collections.abc import Iterator, Sequence
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


class Timeline:
    """Which part of some work runs when, without a wait: each moment begins a part and ends the one before.

    On an accelerator a moment is an event in the stream, elsewhere a reading of the host's clock.

    Attributes:
        device: where the work runs.
        part: that runs now.
        seconds: of each part, as far as `fold` has added them up.
    """

    def __init__(self, device: torch.device, parts: Sequence[str], first: str):
        """Start at zero.

        Args:
            device: where the work runs.
            parts: all there are.
            first: of them, which runs at first.
        """
        self.device = device
        self.part = first
        self.seconds = dict.fromkeys(parts, 0.0)
        self._marks: list[tuple[str, torch.Event | float]] = []

    def enter(self, part: str) -> str:
        """Let a part begin now; return the one that ends."""
        before, self.part = self.part, part
        self._marks.append((part, self._now()))
        return before

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Count what runs inside for a part, and then go on with the one before."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def fold(self) -> None:
        """Add up the marks so far; call it when the device has reached the last one."""
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[part] += end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3
        del self._marks[:-1]

    def take(self) -> dict[str, float]:
        """Return the seconds of each part since the last call."""
        taken, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return taken

    def _now(self) -> torch.Event | float:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event
