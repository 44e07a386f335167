"""What libraries print that no user needs: kept off the screen, never out of the log.

`python -m llava.train.noise` passes its input on without these lines; scripts/lib/train.sh puts it between the log and
the screen. A run that is started without a script has no log: it hides them itself, unless `--verbose_log True`.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import TextIO

# Whole lines. Everything else is shown: a warning that is not listed may concern the user.
NOISE = re.compile(
    r"""
    \[[\d: ,-]+\]\ \[INFO\]\ .*                                       # DeepSpeed and its launcher
    | .*\ Unable\ to\ find\ hostfile,\ will\ proceed\ with.*          # the launcher, on one machine
    | \[Gloo\]\ Rank\ \d+\ is\ connected\ to\ .*                      # ranks on the CPU
    | .*\.py:\d+:\ (Future|Deprecation|PendingDeprecation)Warning:.*  # to the authors of libraries
    | .*\.py:\d+:\ UserWarning:\ Slicing\ a\ flattened\ dim\ .*      # accelerate, of FSDP2's ranks
    | \s+sliced_mesh_layout\ =\ .*                                    # and the line of code with it
    | .*\ When\ using\ FSDP,\ prefer\ `.*\ over\ .*                   # which names layers anew
    | \s+warnings\.warn\(.*                                           # the line of code that Python shows with them
    | Failed\ to\ load\ CPU\ gemm_4bit_forward\ .*                    # bitsandbytes, of an optional package
    | .*\d+%\|.*\|\ \d+/\d+\ \[.*\]\s*(\x1b\[A)?                      # progress bars of saving
    """,
    re.VERBOSE,
)
AUTHORS_WARNINGS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
NOISY_LOGGERS = ("bitsandbytes.backends.cpu.ops",)


def is_noise(line: str) -> bool:
    """Whether a line, with or without its end, is of no use to a user."""
    return NOISE.fullmatch(line.rstrip("\r\n")) is not None


def hide_noise() -> None:
    """Keep what this process would print of it off its streams; call it before libraries are imported."""
    if not sys.warnoptions:  # python -W, PYTHONWARNINGS
        for category in AUTHORS_WARNINGS:
            warnings.simplefilter("ignore", category)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).addFilter(lambda record: not is_noise(record.getMessage()))


def pass_on(lines: Iterable[str], screen: TextIO) -> None:
    """Write the lines that are not noise. If the screen is gone, keep reading, so that the writer does not block."""
    for line in lines:
        if not is_noise(line):
            with suppress(OSError, ValueError):
                screen.write(line)
                screen.flush()


def main() -> None:
    """Pass standard input on to standard output."""
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    pass_on(sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
