"""A user's mistake, told in one line.

Every check of user input (config strings, folders, images, question files) raises `InputError`; every command-line
face runs its `main` through `run_command`, which prints that line instead of a traceback. Programming errors are
not caught here: they keep their traceback.
"""

import os
import sys
from collections.abc import Callable

# Packages that single parts of llava need, each with its name for pip.
PACKAGES = {
    "accelerate": "accelerate",
    "bitsandbytes": "bitsandbytes",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "matplotlib": "matplotlib",
    "open_clip": "open_clip_torch",
    "openai": "openai",
    "openpyxl": "openpyxl",
    "pandas": "pandas",
    "peft": "peft",
}


class InputError(ValueError):
    """Wrong input: the message is one line that says what is wrong, where, and what would be right."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line `main`; on a user's mistake print one line and leave with exit code 2.

    Args:
        main: the command, without arguments (it reads `sys.argv` itself).

    Raises:
        SystemExit: with code 2 after an `InputError`, and when one of `PACKAGES` is not installed; 130 after Ctrl-C;
            141 where whoever read the output has left (`... | head -1`), as the shell has it.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more on leaving; what is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except InputError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        package = PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        sys.stderr.write(f"error: this needs the package {package}, which is not installed: pip install {package}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
