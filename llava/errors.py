"""A user's mistake, told in one line.

Every check of user input (config strings, folders, images, question files) raises `InputError`. Every command runs its
`main` through `run_command`, which prints that line instead of a traceback, and does the same for what happens to any
program: signals, a closed or full output, too little memory. Programming errors keep their traceback.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from llava.packages import EXTRAS, NEEDED_BY_SOME, name_package, tell_install
from llava.signals import describe_stop, note_told, raising_on

PACKAGES = {*NEEDED_BY_SOME, *EXTRAS, "gradio"}
"""Packages that single parts of llava need, by the name to import."""


class InputError(ValueError):
    """Wrong input: the message is one line that says what is wrong, where, and what would be right."""


def one_line(text: str) -> str:
    """Make text from anywhere fit for one line of a terminal.

    White space becomes single spaces; control characters, which may be terminal commands of a server, and what cannot
    be encoded are shown as escapes such as `\\x1b`.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in " ".join(text.split())
    )


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line `main`; on a user's mistake print one line and leave with exit code 2.

    Meanwhile standard input and output replace what their encoding lacks, and a stream that the caller has closed
    (`>&-`) is the null device.

    Args:
        main: the command, without arguments (it reads `sys.argv` itself).

    Raises:
        SystemExit: with code 2 after an `InputError`, an error of the system, too little memory or space on a disk, or
            when one of `PACKAGES` is not installed; 130 after Ctrl-C, 143 after SIGTERM, 141 where the
            reader of the output has left (`... | head -1`), as the shell has it.
    """
    _prepare_streams()
    try:
        # Not SIGHUP: where the main thread waits inside a library, as training does, nothing but the signal ends it.
        with raising_on((signal.SIGINT, signal.SIGTERM)):
            try:
                main()
            except SystemExit:  # argparse's --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        ending = _explain(error)
        if ending is None:
            raise
        code, line = ending
    else:
        return
    _finish_streams(f"{line}\n" if line else "")
    note_told()
    raise SystemExit(code)


def _explain(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the line for an error, None for one that is not the user's or the system's."""
    if isinstance(error, InputError):
        return 2, f"error: {one_line(str(error))}"
    if isinstance(error, ModuleNotFoundError):
        name = (error.name or "").partition(".")[0]
        missing = f"error: this needs the package {name_package(name)}, which is not installed: {tell_install(name)}"
        return (2, missing) if name in PACKAGES else None
    if isinstance(error, KeyboardInterrupt):
        return describe_stop(error)
    if isinstance(error, BrokenPipeError):
        return 141, ""
    if isinstance(error, OSError):
        return 2, f"error: {one_line(_describe_system_error(error))}"
    if _is_out_of_memory(error):
        details = f" ({one_line(str(error))})" if str(error) else ""
        return 2, f"error: out of memory{details}; use smaller inputs, smaller batches or a smaller model"
    if _is_failed_write(error):
        return 2, f"error: cannot write weights ({one_line(str(error))}): is the disk full?"
    if isinstance(error, RecursionError):
        return 2, "error: an input is nested too deeply; look for brackets inside brackets in the files it reads"
    return None


def _describe_system_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EBADF, errno.EIO, errno.EFBIG):
        return f"cannot write the output: {reason}"
    return reason


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's allocator of an accelerator, or its allocator of the host has run out of memory."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _is_failed_write(error: BaseException) -> bool:
    """Whether safetensors or torch could not write a file to its end; neither raises an OSError."""
    text = str(error)
    return (type(error).__name__ == "SafetensorError" and "serializing: I/O error" in text) or (
        isinstance(error, RuntimeError) and ("PytorchStreamWriter failed" in text or "inline_container.cc" in text)
    )


def _prepare_streams() -> None:
    # A descriptor that is free would be given to the next file that is opened, and printed text would land there.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number: this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _finish_streams(line: str) -> None:
    """Write the last line, and what is left of the output, as far as anybody takes it."""
    with suppress(OSError, ValueError):
        sys.stderr.write(line)
        sys.stderr.flush()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Python flushes once more on leaving; what is still to be written goes nowhere.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
