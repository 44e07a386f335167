"""MMBench-CN dev on shapes: Chinese questions with English object names."""

import random
from collections.abc import Sequence
from pathlib import Path

from playground.shapes.benchmark.mmbench import write_table
from playground.shapes.file import Drawing

FILE = "mmbench_dev_cn_20231003.tsv"


def write(folder: Path, drawings: Sequence[Drawing], chooser: random.Random) -> None:
    """Write the Chinese table."""
    write_table(folder / FILE, drawings, chooser, chinese=True)
