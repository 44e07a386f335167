"""The benchmarks by name. A benchmark is one file here, one line in the table, and one script."""

import difflib

from llava.errors import InputError
from llava.eval.task import Task
from llava.eval.tasks.pope import Pope

TASKS: dict[str, Task] = {
    "pope": Pope(),
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
