"""Public datasets of the hub, written once into the published layout; from then on they are local data.

A converter per benchmark knows the dataset's name, tables and columns; `SOURCES` has them by the benchmark's word and
split (None: the benchmark has one). Question files and annotations get the published names and words, so questions
and prompts are those of local data. Where a dataset lacks something, its converter says what is done.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llava.errors import InputError
from llava.eval.answers import explain_write_errors
from llava.eval.hub.gqa import GqaTestdev
from llava.eval.hub.layout import Layout
from llava.eval.hub.llavabench import LlavaBenchWild
from llava.eval.hub.mmbench import MMBenchChinese, MMBenchEnglish, MMBenchEnglish2023October
from llava.eval.hub.mme import Mme
from llava.eval.hub.mmvet import MMVet
from llava.eval.hub.pope import PopeFull
from llava.eval.hub.seed import SeedBench
from llava.eval.hub.source import HubSource, Rows
from llava.eval.hub.sqa import ScienceQaImg
from llava.eval.hub.textvqa import TextVqaVal
from llava.eval.hub.vizwiz import VizWizTest, VizWizVal
from llava.eval.hub.vqav2 import Vqav2TestDev, Vqav2Val
from llava.eval.results import write_json
from llava.eval.task import Task

SOURCES: dict[str, dict[str, HubSource]] = {
    "vqav2": {"test-dev2015": Vqav2TestDev(), "val2014": Vqav2Val()},
    "gqa": {"testdev_balanced": GqaTestdev()},
    "vizwiz": {"test": VizWizTest(), "val": VizWizVal()},
    "sqa": {"test": ScienceQaImg()},
    "textvqa": {"val": TextVqaVal()},
    "pope": {"coco": PopeFull()},
    "mme": {"all": Mme()},
    "mmbench": {"mmbench_dev_20230712": MMBenchEnglish(), "mmbench_dev_en_20231003": MMBenchEnglish2023October()},
    "mmbench_cn": {"mmbench_dev_cn_20231003": MMBenchChinese()},
    "seed": {"all": SeedBench()},
    "llavabench": {"wild": LlavaBenchWild()},
    "mmvet": {"all": MMVet()},
}
"""By the benchmark's word, then by split; the first split is read where none is named."""

MARKER_FILE = ".hub.json"
"""In the benchmark's folder: which dataset each split came from."""
LOCK_FILE = ".hub.lock"
PARTIAL_FOLDER = ".hub-partial"
COMPLETE_FILE = ".complete"


def fetch_benchmark(task: Task, root: Path, dataset: str | None = None) -> None:
    """Make sure that a benchmark's folder holds the hub's data; does nothing the second time.

    Several processes may call it at once: one works, the others wait.

    Args:
        task: the benchmark, on its split.
        root: its folder.
        dataset: name on the hub or folder of parquet files, instead of the benchmark's own.

    Raises:
        InputError: no such split, the folder holds other data, or the dataset cannot be read.
    """
    split, source = find_source(task)
    name = dataset or source.dataset
    with explain_write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    with only_one(root / LOCK_FILE):
        held = read_marker(root)
        if held.get(split) == name:
            return
        if split in held:
            raise InputError(f"{root} holds {held[split]} already; name another --root for {name}")
        partial = root / PARTIAL_FOLDER / split
        if not is_complete(partial, name):
            refuse_other_data(root, source)
            write_layout(source, name, partial, root)
        with explain_write_errors(root):
            publish(partial, root, source.files)
        write_json(root / MARKER_FILE, {**held, split: name})
        shutil.rmtree(root / PARTIAL_FOLDER, ignore_errors=True)


def find_source(task: Task) -> tuple[str, HubSource]:
    """Return the split of a benchmark and its form on the hub.

    Raises:
        InputError: the hub has none.
    """
    sources = SOURCES.get(task.name, {})
    # Where the hub has all splits in one, a benchmark's own ones only choose among its questions.
    named = getattr(task, "split", None) or getattr(task, "table", None)
    split = named if named and len(sources) > 1 else next(iter(sources), None)
    if split not in sources:
        raise InputError(
            f"{task.name}: no hub dataset of split {split}; known: {', '.join(sources) or 'none'}; "
            "leave out --source hub and see playground/data/eval/README.md"
        )
    return split, sources[split]


def refuse_other_data(root: Path, source: HubSource) -> None:
    """Make sure that nothing of the user's is overwritten.

    Raises:
        InputError: a file that the hub's data would bring is there.
    """
    present = [name for name in source.files if (root / name).exists()]
    if present:
        raise InputError(
            f"{root / present[0]} is there already and is not from the hub; leave out --source hub, "
            "or name another --root"
        )


def write_layout(source: HubSource, name: str, partial: Path, root: Path) -> None:
    """Write all files into a folder of their own, going on with what an earlier attempt left."""
    owner = partial / ".dataset"
    with explain_write_errors(partial):
        if partial.exists() and not (owner.is_file() and owner.read_text(encoding="utf-8") == name):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        owner.write_text(name, encoding="utf-8")
    source.convert(Rows(source, name), Layout(partial, root))
    with explain_write_errors(partial):
        (partial / COMPLETE_FILE).write_text(name, encoding="utf-8")


def is_complete(partial: Path, name: str) -> bool:
    """Tell whether all files of a dataset are written and only wait for being moved."""
    path = partial / COMPLETE_FILE
    return path.is_file() and path.read_text(encoding="utf-8") == name


def publish(partial: Path, root: Path, files: tuple[str, ...]) -> None:
    """Move the files to their places, pictures first, so that a question file never stands there alone."""
    names = [str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()]
    for name in sorted((name for name in names if not name.startswith(".")), key=lambda name: (name in files, name)):
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(target)


def read_marker(root: Path) -> dict[str, str]:
    """Return which dataset each split in a folder came from."""
    try:
        marker = json.loads((root / MARKER_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Keep other processes out meanwhile; the kernel lets the next one in however this one ends."""
    with explain_write_errors(path):
        file = path.open("a+b")
    with file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
