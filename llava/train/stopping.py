"""Ending early: a signal becomes a checkpoint at the next step, in bounded time, and no rank outlives its launcher.

    before training   the process ends at once
    while it trains   the ranks agree on a step, write a checkpoint there, and end
    SECONDS later     whatever has not ended is killed; a second signal does so at once

SIGINT, SIGTERM and SIGUSR1 ask for it; scripts/lib/train.sh sends the last one, which launchers ignore, to all ranks.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

from llava.signals import SIGNAL_CODE, watch_starter

SECONDS_VARIABLE, DEFAULT_SECONDS = "STOP_SECONDS", 60.0


class _Stop:
    """What is known in this process; signals belong to processes, so there is one."""

    def __init__(self) -> None:
        self.owner = 0
        self.code = 0
        self.is_training = False


_STOP = _Stop()


def install() -> None:
    """Answer signals from now on, and watch the launcher if there is one; call it in the main thread."""
    if _STOP.owner == os.getpid():
        return
    _STOP.owner = os.getpid()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has no SIGUSR1
        # What was ignored stays so (a background job's Ctrl-C); launchers ignore SIGUSR1, which is meant for ranks.
        if number is not None and (name == "SIGUSR1" or signal.getsignal(number) is not signal.SIG_IGN):
            signal.signal(number, _answer)
    watch_starter(getattr(signal, "SIGUSR1", signal.SIGTERM), is_rank="LOCAL_RANK" in os.environ)


def begin_training() -> None:
    """From now on a signal asks for a checkpoint instead of ending the process at once."""
    _STOP.is_training = True


def is_requested() -> bool:
    """Whether this process was asked to stop."""
    return _STOP.code > 0


def exit_code() -> int:
    """The exit code of a stopped process: 130 after SIGINT, else 143."""
    return _STOP.code or SIGNAL_CODE + signal.SIGTERM


def keep_worker() -> None:
    """Let a data loader's worker survive a signal to the whole group: the last step may need its samples."""
    signal.signal(signal.SIGTERM, _answer)


def _answer(number: int, frame: FrameType | None) -> None:
    code = SIGNAL_CODE + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
    if os.getpid() != _STOP.owner:
        # A data loader's worker: the main process ends it.
        if number == signal.SIGTERM:
            _end_after(_seconds(), code)
        return
    is_repeated = _STOP.code and number != getattr(signal, "SIGUSR1", None)
    if is_repeated or not _STOP.is_training:
        if not _STOP.is_training:
            _say("stopped before the training began")
        os._exit(code)
    if not _STOP.code:
        _STOP.code = code
        _end_after(_seconds(), code, f"\nstopped: no checkpoint within {_seconds():g} seconds")


def _seconds() -> float:
    try:
        return max(0.0, float(os.environ.get(SECONDS_VARIABLE, DEFAULT_SECONDS)))
    except ValueError:
        return DEFAULT_SECONDS


def _end_after(seconds: float, code: int, line: str = "") -> None:
    def end() -> None:
        time.sleep(seconds)
        if line:
            _say(line)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def _say(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())
