"""A command that scores the model every N steps: `--eval_command`, a hook that knows no benchmark.

The command gets a checkpoint in a folder of its own and writes lines `name<TAB>value`. It runs in a process of its own,
so the training's weights, random states and shards are as before.
"""

import logging
import math
import os
import re
import shlex
import shutil
import string
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError
from llava.files import make_folder, read_text
from llava.signals import PARENT_VARIABLE

logger = logging.getLogger(__name__)

PLACES = ("checkpoint", "results", "step")
FOLDER = "scored"
LOG_FILE = "scored.log"
NOTE = re.compile(r"\[[^]]*\]")  # such as "[8860 answers missing]" of a slice
# What launchers tell the ranks of a run; the command is no rank of it.
RANK_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|(LOCAL|CROSS|GROUP|ROLE)_\w+|MASTER_(ADDR|PORT)|(ACCELERATE|TORCHELASTIC)_\w+"
)


@dataclass(frozen=True)
class ScoreCommand:
    """A checked command.

    Attributes:
        words: of the command, with `{checkpoint}`, `{results}` and `{step}` in them.
        folder: the run's output folder, where the checkpoint lies for as long as the command runs.
        only_projector: whether that is `mm_projector.bin` and config.json alone (stage 1).
    """

    words: tuple[str, ...]
    folder: Path
    only_projector: bool

    @property
    def checkpoint(self) -> Path:
        """Where the trainer puts the weights for the command."""
        return self.folder.absolute() / FOLDER / "checkpoint"

    def run(self, step: int) -> dict[str, float]:
        """Score what lies at `checkpoint`; a command that fails is a warning, and the training goes on.

        Args:
            step: of the training.

        Returns:
            The values by their names, as `score_<name>`.
        """
        results = self.checkpoint.with_name("results.txt")
        places = {"checkpoint": str(self.checkpoint), "results": str(results), "step": str(step)}
        command = [word.format(**places) for word in self.words]
        environment = {name: value for name, value in os.environ.items() if not RANK_VARIABLES.fullmatch(name)}
        environment[PARENT_VARIABLE] = str(os.getpid())
        log = self.folder / LOG_FILE
        with log.open("a", encoding="utf-8") as file:
            file.write(f"== step {step}: {shlex.join(command)}\n")
            file.flush()
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            ).returncode
        if code:
            logger.warning("--eval_command ended with code %d at step %d: see %s", code, step, log)
            return {}
        try:
            return read_scores(results)
        except InputError as error:
            logger.warning("--eval_command at step %d: %s (its output: %s)", step, error, log)
            return {}

    @contextmanager
    def room(self) -> Iterator[Path]:
        """Return the empty folder for the checkpoint, which is gone afterwards."""
        shutil.rmtree(self.checkpoint.parent, ignore_errors=True)
        try:
            yield make_folder(self.checkpoint)
        finally:
            shutil.rmtree(self.checkpoint.parent, ignore_errors=True)


def check_command(text: str) -> tuple[str, ...]:
    """Split a command into words.

    Raises:
        InputError: it cannot be split, its program is not there, or it does not say where checkpoint and results go.
    """
    try:
        words = tuple(shlex.split(text))
        named = {name for word in words for _, name, _, _ in string.Formatter().parse(word) if name is not None}
    except ValueError as error:
        raise InputError(f"--eval_command {text!r}: {error}") from None
    if named - set(PLACES) or not {"checkpoint", "results"} <= named:
        raise InputError(
            f"--eval_command {text!r}: expected {{checkpoint}} and {{results}} in it (and {{step}} if you like); "
            "write {{ for a brace"
        )
    if shutil.which(words[0]) is None:
        raise InputError(f"--eval_command: no program {words[0]}")
    return words


def read_scores(file: Path) -> dict[str, float]:
    """Read lines `name<TAB>value`, as `python -m llava.eval run` writes them.

    Raises:
        InputError: there is none, or one is not like this.
    """
    scores = {}
    for line in read_text(file, hint="the command writes lines name<TAB>value into {results}").splitlines():
        name, _, value = line.rpartition("\t")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name.strip() or not math.isfinite(number):
            raise InputError(f"{file}: expected lines name<TAB>value, found {line!r}")
        scores["score_" + "_".join(re.findall(r"\w+", NOTE.sub("", name)))] = number
    if not scores:
        raise InputError(f"{file}: no line name<TAB>value")
    return scores
