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
WATCH_SECONDS = 0.1


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
        self.is_told = False
        self.is_watched = False


_STATE = _State()


def describe_stop(error: KeyboardInterrupt) -> tuple[int, str]:
    """Return the exit code and the line for a process that a signal ends."""
    return _describe(error.number if isinstance(error, Stopped) else signal.SIGINT)


def note_told() -> None:
    """Note that the line of `describe_stop` is written: whoever ends this process from now on adds nothing."""
    _STATE.is_told = True


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
    free = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in free}
    _STATE.owner, _STATE.stopped_by, _STATE.is_told = os.getpid(), 0, False
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
        if hasattr(os, "set_blocking"):  # pipes of Windows had none before Python 3.12, nor does it ask for it
            os.set_blocking(writing, False)
        # Python writes the number of each signal there at once, also while the main thread is inside a library.
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=_end_after_signal, args=(reading, numbers, grace_seconds), daemon=True).start()
        watch_starter(signal.SIGTERM)
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
            # A thread that outlives the command keeps its process alive behind the last line.
            if not _STATE.is_told:
                # Not through `sys.stderr`, which the main thread may hold.
                with suppress(OSError):
                    os.write(2, f"\n{line}\n".encode())
            os._exit(code)
    os.close(reading)


def watch_starter(number: int, is_rank: bool = False) -> None:
    """Send this process a signal once what started it is gone, which cannot pass SIGKILL on.

    Args:
        number: the signal.
        is_rank: whether its parent, a launcher, is watched beside what `PARENT_VARIABLE` names.
    """
    named = os.environ.pop(PARENT_VARIABLE, "")
    watched = ([int(named)] if named.isdecimal() else []) + ([os.getppid()] if is_rank else [])
    if watched:
        threading.Thread(target=_signal_without, args=(watched, number), daemon=True).start()


def _signal_without(processes: Sequence[int], number: int) -> None:
    while all(map(is_alive, processes)):
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), number)


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    if sys.platform == "win32":
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError):  # there is no /proc on macOS
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[:1] != [b"Z"]
    return True


def _is_alive_on_windows(process: int) -> bool:
    import _winapi  # by which `subprocess` waits there; signal 0 would end the process

    try:
        handle = _winapi.OpenProcess(_winapi.SYNCHRONIZE, False, process)
    except PermissionError:
        return True
    except OSError:
        return False
    try:
        return _winapi.WaitForSingleObject(handle, 0) == _winapi.WAIT_TIMEOUT
    finally:
        _winapi.CloseHandle(handle)
