"""What holds for every benchmark alike: one broken record and one missing image cost their own questions only."""

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.benchmark import Benchmark, Row, row_key
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.predict import Settings, answer_questions
from llava.eval.predictions import pair_answers

FOLDERS = {
    "sqa": "scienceqa",
    "seed": "seed_bench",
    "llavabench": "llava_bench_in_the_wild",
    "mmvet": "mm_vet",
}
"""Of the made-up data, where it is not the benchmark's word."""


class MemorySink:
    """Keeps rows by the benchmark's own key."""

    def __init__(self, key_fields: tuple[str, ...]) -> None:
        self.key_fields = key_fields
        self.done: dict[str, Row] = {}
        self.count = 0

    def claim(self, unit: int) -> bool:
        return True

    def refresh(self) -> None:
        pass

    def append(self, rows: list[Row]) -> None:
        self.count += len(rows)
        self.done.update((row_key(row, self.key_fields), row) for row in rows)


def break_line(path: Path) -> None:
    """Make the fourth line of a question file something else."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines[:3], '{"question_id": \n', *lines[4:]]), encoding="utf-8")


def break_science_record(path: Path) -> None:
    records = json.loads(path.read_text(encoding="utf-8"))
    records[3]["conversations"] = []
    path.write_text(json.dumps(records), encoding="utf-8")


def break_table_row(path: Path) -> None:
    """Give a row an index that is no number, and another an image that is no base64."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    rows[4][rows[0].index("index")] = "seven"
    rows[5][rows[0].index("image")] = "%" * 100
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


QUESTION_FILES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "vqav2": ("llava_vqav2_mscoco_val2014.jsonl", break_line),
    "gqa": ("llava_gqa_testdev_balanced.jsonl", break_line),
    "vizwiz": ("llava_val.jsonl", break_line),
    "sqa": ("llava_test_CQM-A.json", break_science_record),
    "textvqa": ("llava_textvqa_val_v051_ocr.jsonl", break_line),
    "pope": ("llava_pope_test.jsonl", break_line),
    "mme": ("llava_mme.jsonl", break_line),
    "mmbench": ("mmbench_dev_20230712.tsv", break_table_row),
    "mmbench_cn": ("mmbench_dev_cn_20231003.tsv", break_table_row),
    "seed": ("llava-seed-bench.jsonl", break_line),
    "llavabench": ("questions.jsonl", break_line),
    "mmvet": ("llava-mm-vet.jsonl", break_line),
}


@pytest.fixture(params=list(BENCHMARKS))
def broken(request: pytest.FixtureRequest, golden: Path, tmp_path: Path) -> tuple[Benchmark, Path]:
    """A benchmark with all images but one, and one broken record."""
    name = request.param
    root = tmp_path / name
    shutil.copytree(golden / "oracle" / FOLDERS.get(name, name), root)
    file, break_record = QUESTION_FILES[name]
    break_record(root / file)
    return BENCHMARKS[name], root


def draw_images(task: Benchmark, root: Path, spare_last: bool = True) -> Path | None:
    """Put an image wherever a question wants one, but for the last; return that, or None where they are embedded."""
    images = {image: None for question in task.load(root) for image in question.images if isinstance(image, Path)}
    for number, image in enumerate(images):
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number % 256, 0, 0)).save(image, "PNG")
    last = list(images)[-1] if images else None
    if last and spare_last:
        last.unlink()
    return last


def test_a_broken_record_and_a_missing_image_are_reported_by_id_and_the_rest_is_answered(
    broken: tuple[Benchmark, Path], fake_parts: tuple
) -> None:
    task, root = broken
    missing = draw_images(task, root)
    questions = task.load(root)
    unsound = [question for question in questions if question.fault]
    unseen = [question for question in questions if missing in question.images]
    if missing is None:
        unseen = [question for question in questions if any(not image.content for image in question.images)]
    assert len(unsound) == 1
    assert unseen
    sink = MemorySink(task.key_fields)
    faults = answer_questions(*fake_parts, questions, sink, Settings(model_id="llava", batch_size=8))
    assert sorted(str(fault.question.id) for fault in faults) == sorted(str(each.id) for each in unsound + unseen)
    assert all(str(fault.question.images[0]) in fault.reason for fault in faults if fault.question in unseen)
    assert sink.count == len(sink.done) == len(questions) - len(faults)


def test_answers_find_their_questions_in_any_order(broken: tuple[Benchmark, Path], fake_parts: tuple) -> None:
    task, root = broken
    draw_images(task, root)
    questions = task.load(root)
    sink = MemorySink(task.key_fields)
    answer_questions(*fake_parts, questions, sink, Settings(model_id="llava", batch_size=8))
    rows = list(sink.done.values())
    paired = pair_answers(questions, reversed(rows), task.key_fields)
    assert {key: row["answer_id"] for key, row in paired.items()} == {
        key: row["answer_id"] for key, row in sink.done.items()
    }
