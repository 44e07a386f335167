"""The benchmarks' data: what is fetched for each, and whether what is there is all that answering and scoring need.

A benchmark's own file names its downloads; `llava.download` fetches them. A check reads the questions as `answer` does,
looks every image up, decodes a few, and compares numbers with those of the official files. Data that `--source hub` has
written are complete by themselves, and may differ from these numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llava.check import Finding
from llava.download.inventory import DELETE, count_records, find_missing, find_unreadable
from llava.download.store import DataSet
from llava.download.table import Download
from llava.errors import InputError
from llava.eval.benchmark import Benchmark, ImageSource, Question
from llava.eval.benchmarks import BENCHMARKS, find_benchmark
from llava.eval.hub import HubForm, read_marker
from llava.image import EmbeddedImage

NUM_DECODED = 20
"""Images of a benchmark that a check decodes."""


def choose_tasks(names: Sequence[str], split: str | None = None) -> list[Benchmark]:
    """Return benchmarks by name, each once; `all` or no name means all of them.

    Raises:
        InputError: there is no such benchmark or split.
    """
    tasks = map(find_benchmark, BENCHMARKS if "all" in names or not names else dict.fromkeys(names))
    return [task if split is None else task.with_split(split) for task in tasks]


# -------------------------------------------------------------------------------------------------------------- splits
def name_split(task: Benchmark) -> str | None:
    """Return the split that a benchmark is on, where it is one of several that are named."""
    return getattr(task, "split", None) or getattr(task, "table", None)


def settle_split(task: Benchmark) -> Benchmark:
    """Return a benchmark on the split that it is on, or else on the one that is fetched by default."""
    default = next((name for download in task.downloads for name in download.splits), None)
    return task.with_split(default) if default and name_split(task) is None else task


def list_downloads(task: Benchmark) -> list[Download]:
    """List the downloads of a split."""
    return [each for each in task.downloads if not each.splits or name_split(task) in each.splits]


def choose_split(task: Benchmark, home: Path) -> Benchmark:
    """Return a benchmark on the split that is checked: the one that it is on, or that its commands would take.

    If nothing is there of the latter, another one may be missed: the one that is fetched by default.
    """
    default = settle_split(task)
    if name_split(task) == name_split(default):
        return task
    with suppress(InputError):  # no table of MMBench is there
        usual = task.with_split(task.split_in(home))
        if any(download.is_there(home) for download in list_downloads(usual) if download.splits):
            return usual
    return default


def find_origin(task: Benchmark, home: Path) -> HubForm | None:
    """Return the dataset on the hub that a split in a folder is made of; None if it is not from the hub."""
    marker = read_marker(home)
    if not marker:
        return None
    with suppress(InputError):  # the split is not on the hub
        split, form = task.find_hub_form()
        return replace(form, dataset=marker[split]) if split in marker else None
    return None


# ------------------------------------------------------------------------------------------------------------ download
def plan_data(tasks: Sequence[Benchmark], data_root: Path) -> tuple[list[DataSet], list[str]]:
    """Return the data sets of benchmarks, and a line for each benchmark that has nothing to fetch.

    Args:
        tasks: the benchmarks.
        data_root: the folder that holds their folders.
    """
    data_sets, others = [], []
    for task in map(settle_split, tasks):
        home = task.find_root(data_root)
        origin = find_origin(task, home)
        downloads = list_downloads(task)
        if origin:
            others.append(f"{task.name}: {home} holds {origin.dataset}, from the hub")
        elif not downloads:
            others.append(f"{task.name}: its file names no downloads of this split")
        else:
            data_sets.append(DataSet(task.name, home, downloads))
    return data_sets, others


# --------------------------------------------------------------------------------------------------------------- check
def check_task(task: Benchmark, data_root: Path) -> Iterator[Finding]:
    """Find out whether a benchmark can be answered and scored; one finding if all is well, else one for each fault.

    Args:
        task: the benchmark, see `choose_split`.
        data_root: the folder that holds the benchmarks' folders.
    """
    home = task.find_root(data_root)
    remedy = f"python -m llava.eval download {task.name}"
    if not home.is_dir():
        remedy = f"; {remedy}" if task.downloads else ""
        yield Finding(task.name, f"nothing is there, no folder {home}{remedy}", is_fault=True)
        return
    task = choose_split(task, home)
    if named := name_split(task):
        remedy += f" --split {named}"
    # 1. The files.
    origin = find_origin(task, home)
    if origin:
        faults = [f"no {name};" for name in origin.files if not (home / name).is_file()]
    else:
        faults = list(find_file_faults(list_downloads(task), home))
    # 2. The questions.
    questions: list[Question] = []
    split = named or next(iter(task.official), "all")
    try:
        questions, split = task.load(home), task.split_in(home)
    except InputError as error:
        if not faults:  # a missing file has been named already
            faults.append(f"{error}{DELETE}")
    official = task.official.get(split)
    if questions and official and not origin and len(questions) != official.questions:
        faults.append(f"{len(questions):,} questions instead of {official.questions:,}, in their file{DELETE}")
    faults += find_record_faults(questions)
    # 3. The images.
    images = list(dict.fromkeys(image for question in questions for image in question.images))
    if official and official.images and not origin and questions and len(images) != official.images:
        faults.append(f"questions about {len(images):,} images instead of {official.images:,}, in their file{DELETE}")
    faults += find_image_faults(images)
    for fault in faults:
        text = f"{fault} {remedy}" if task.downloads else fault.removesuffix(DELETE).rstrip(";")
        yield Finding(task.name, text, is_fault=True)
    if not faults:
        source = f", from {origin.dataset} on the hub" if origin else ""
        found = f"{len(questions):,} questions, {len(images):,} images"
        yield Finding(task.name, f"{split}: {found}{source}, in {home}")


def find_file_faults(downloads: Sequence[Download], home: Path) -> Iterator[str]:
    """Yield what is wrong with files; folders of images are judged by the questions about them.

    Each line is followed by the command that fetches the files, as the lines of the functions below.
    """
    for place in (place for download in downloads for place in download.places):
        path = next((home / each for each in (place.path, *place.also) if (home / each).exists()), None)
        if path is None:
            yield f"no {place.path};"
        elif place.is_folder:
            continue
        elif not path.stat().st_size:
            yield f"{place.path} is empty;"
        elif place.count is not None:
            try:
                number = count_records(path)
            except InputError as error:
                yield f"{error}{DELETE}"
            else:
                if number != place.count:
                    yield f"{place.path} has {number:,} records instead of {place.count:,}{DELETE}"


def find_record_faults(questions: Sequence[Question]) -> Iterator[str]:
    """Yield how many records of a question file cannot be asked."""
    broken = [question for question in questions if question.fault]
    if broken:
        yield f"{len(broken):,} broken records, such as {broken[0].id}: {broken[0].fault}, in their file{DELETE}"


def find_image_faults(images: Sequence[ImageSource]) -> Iterator[str]:
    """Yield which images are missing, and which of a sample cannot be decoded."""
    missing = find_missing([image for image in images if isinstance(image, Path)])
    if missing:
        yield f"{len(missing):,} of {len(images):,} images are missing, such as {missing[0]};"
    absent = set(missing)
    there = [image for image in images if isinstance(image, Path | EmbeddedImage) and image not in absent]
    yield from (f"{fault}{DELETE}" for fault in find_unreadable(there, NUM_DECODED).values())
