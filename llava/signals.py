"""How a signal ends a process: one exception, one line, and the exit code of the shell, 128 and the signal's number.

python -m llava...     SIGINT and SIGTERM raise `Stopped` in the main thread (`errors.run_command`)
python -m llava.eval   the same, SIGHUP as well, and the process ends within seconds (`ending_on_signals`)
training               writes a checkpoint first (`llava.train.stopping`)
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SIGNAL_CODE = 128
GRACE_SECONDS = 2.0
"""How long a command that was told to end may clean up."""
PARENT_VARIABLE = "LLAVA_SCRIPT_PID"
"""Names the process that started this one as its worker: when that is gone, however it ended, this one ends too."""
WATCH_SECONDS = 1.0
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(KeyboardInterrupt):
    """A signal told this process to end; whatever cleans up after Ctrl-C cleans up after this."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class _State:
    """What is known in this process; signals belong to processes, so there is one."""

    def __init__(self) -> None:
        self.owner = 0
        self.stopped_by = 0
        self.is_watched = False


_STATE = _State()


def describe_stop(error: KeyboardInterrupt) -> tuple[int, str]:
    """Return the exit code and the line for a process that a signal ends."""
    return _describe(error.number if isinstance(error, Stopped) else signal.SIGINT)


def _describe(number: int) -> tuple[int, str]:
    line = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    return SIGNAL_CODE + number, line


@contextmanager
def raising_on(numbers: Sequence[int]) -> Iterator[None]:
    """Raise `Stopped` in the main thread on the first of these signals; the same one again ends the process at once.

    Signals that are ignored, as `nohup` and the shell's `&` have it, and those that somebody answers stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in _DEFAULTS}
    _STATE.owner, _STATE.stopped_by = os.getpid(), 0
    for number in before:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    if os.getpid() != _STATE.owner:  # a worker that was forked off
        os.kill(os.getpid(), number)
    elif not _STATE.stopped_by:  # cleaning up is left in peace
        _STATE.stopped_by = number
        raise Stopped(number)


@contextmanager
def ending_on_signals(grace_seconds: float = GRACE_SECONDS) -> Iterator[None]:
    """Make SIGINT, SIGTERM and SIGHUP end this process within seconds.

    For commands whose files are complete at every moment. If it does not come to `Stopped`, because the main thread
    waits inside a library (a model that is loaded, a thread that reads a slow address), a second thread ends the
    process. When the command that started this one as its worker is gone (`PARENT_VARIABLE`), that counts as SIGTERM.

    Args:
        grace_seconds: how long cleaning up may take.
    """
    if threading.current_thread() is not threading.main_thread() or _STATE.is_watched:
        yield
        return
    with raising_on(STOP_SIGNALS):
        numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is _raise]
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Python writes the number of each signal there at once, also while the main thread is inside a library.
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_end_after_signal, args=(reading, numbers, grace_seconds), daemon=True).start()
        parent = os.environ.pop(PARENT_VARIABLE, "")
        if parent.isdecimal():
            threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
        _STATE.is_watched = True
        try:
            yield
        except KeyboardInterrupt as stop:
            # Once the command has cleaned up, nothing is left to do: taking down the libraries would take seconds.
            atexit.register(_exit, describe_stop(stop)[0])
            raise
        finally:
            _STATE.is_watched = False
            signal.set_wakeup_fd(wakeup)
            os.close(writing)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end_after_signal(reading: int, numbers: Sequence[int], grace_seconds: float) -> None:
    """Wait for a signal, then end the process, unless it ends itself before."""
    while received := os.read(reading, 1):
        if received[0] in numbers:
            time.sleep(grace_seconds)
            code, line = _describe(received[0])
            # Not through `sys.stderr`, which the main thread may hold.
            with suppress(OSError):
                os.write(2, f"\n{line}\n".encode())
            os._exit(code)
    os.close(reading)


def _end_with_parent(parent: int) -> None:
    """Wait until the process that this one works for is gone; it cannot pass SIGKILL on."""
    while is_alive(parent):
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not. Always on Windows: it cannot tell."""
    if os.name != "posix":
        return True  # signal 0 would end it there
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # there is no /proc on macOS
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[:1] != [b"Z"]
    return True
