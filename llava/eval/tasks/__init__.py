"""The benchmarks by name. A benchmark is one file here, one line in the table, and one script."""

import difflib

from llava.errors import InputError
from llava.eval.task import Task
from llava.eval.tasks.gqa import Gqa
from llava.eval.tasks.llavabench import LlavaBench
from llava.eval.tasks.mmbench import MmBench
from llava.eval.tasks.mmbench_cn import MmBenchCn
from llava.eval.tasks.mme import Mme
from llava.eval.tasks.mmvet import MmVet
from llava.eval.tasks.pope import Pope
from llava.eval.tasks.seed import Seed
from llava.eval.tasks.sqa import Sqa
from llava.eval.tasks.textvqa import TextVqa
from llava.eval.tasks.vizwiz import VizWiz
from llava.eval.tasks.vqav2 import Vqav2

TASKS: dict[str, Task] = {
    "vqav2": Vqav2(),
    "gqa": Gqa(),
    "vizwiz": VizWiz(),
    "sqa": Sqa(),
    "textvqa": TextVqa(),
    "pope": Pope(),
    "mme": Mme(),
    "mmbench": MmBench(),
    "mmbench_cn": MmBenchCn(),
    "seed": Seed(),
    "llavabench": LlavaBench(),
    "mmvet": MmVet(),
}


def find_task(name: str) -> Task:
    """Look a benchmark up.

    Raises:
        InputError: there is none of this name; says which there are, and the closest.
    """
    if name in TASKS:
        return TASKS[name]
    closest = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"; did you mean {closest[0]!r}?" if closest else ""
    raise InputError(f"no benchmark {name!r}; known: {', '.join(TASKS)}{hint}")
