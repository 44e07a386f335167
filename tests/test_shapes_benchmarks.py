"""The embedded world in the twelve published layouts: each is read, and its right answers score full marks."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.eval.benchmark import Question
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.judge import make_judge
from llava.eval.predictions import make_row
from llava.eval.results import score_answers, write_result
from llava.image import load_image
from playground.shapes import choice, sentence
from playground.shapes.benchmark import FOLDERS
from playground.shapes.generate import write_eval
from playground.shapes.world import PICTURE_SIZE

NUM_PICTURES = 6
FULL_MARKS = {"mme": 800.0}  # four subtasks of perception, 200 each


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_eval(folder, NUM_PICTURES, seed=11)
    return folder


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truth_of_pope(root: Path) -> Callable[[Question], str]:
    labels = {
        (category, row["image"], row["text"]): row["label"]
        for category in ("adversarial", "popular", "random")
        for row in read_lines(root / f"coco/coco_pope_{category}.json")
    }
    return lambda asked: labels[asked.category, asked.images[0].name, asked.prompt.split("\n")[0]].capitalize()


def truth_of_mme(root: Path) -> Callable[[Question], str]:
    answers = {}
    for file in (root / "MME_Benchmark_release_version").rglob("*.txt"):
        for line in file.read_text().splitlines():
            text, answer = line.split("\t")
            answers[file.parent.name, file.stem, text.removesuffix(" Please answer yes or no.")] = answer
    return lambda asked: answers[asked.category, Path(str(asked.id)).stem, asked.prompt.split("\n")[0]]


def truth_of_table(file: str) -> Callable[[Path], Callable[[Question], str]]:
    def read_answers(root: Path) -> Callable[[Question], str]:
        csv.field_size_limit(2**24)
        with (root / file).open(encoding="utf-8", newline="") as stream:
            answers = {int(row["index"]): row["answer"] for row in csv.DictReader(stream, delimiter="\t")}
        return lambda asked: answers[asked.id]

    return read_answers


def truth_of_vqav2(root: Path) -> Callable[[Question], str]:
    rows = read(root / "v2_mscoco_val2014_annotations.json")["annotations"]
    answers = {row["question_id"]: row["multiple_choice_answer"] for row in rows}
    return lambda asked: answers[asked.id].capitalize()


def truth_of_textvqa(root: Path) -> Callable[[Question], str]:
    rows = read(root / "TextVQA_0.5.1_val.json")["data"]
    answers = {(row["image_id"], row["question"]): row["answers"][0] for row in rows}
    return lambda asked: answers[asked.id, asked.prompt.split("\n")[0].lower()]


def truth_of_vizwiz(root: Path) -> Callable[[Question], str]:
    answers = {row["image"]: row["answers"][0]["answer"] for row in read(root / "val.json")}
    return lambda asked: answers[asked.images[0].name].capitalize()


def truth_by_id(rows: dict) -> Callable[[Question], str]:
    return lambda asked: rows[asked.id]


TRUTHS = {
    "vqav2": truth_of_vqav2,
    "gqa": lambda root: truth_by_id(
        {key: row["answer"] for key, row in read(root / "data/testdev_balanced_questions.json").items()}
    ),
    "vizwiz": truth_of_vizwiz,
    "sqa": lambda root: truth_by_id(
        {key: choice.LETTERS[row["answer"]] for key, row in read(root / "problems.json").items()}
    ),
    "textvqa": truth_of_textvqa,
    "pope": truth_of_pope,
    "mme": truth_of_mme,
    "mmbench": truth_of_table("mmbench_dev_20230712.tsv"),
    "mmbench_cn": truth_of_table("mmbench_dev_cn_20231003.tsv"),
    "seed": lambda root: truth_by_id(
        {int(row["question_id"]): row["answer"] for row in read(root / "SEED-Bench.json")["questions"]}
    ),
    "llavabench": lambda root: truth_by_id(
        {row["question_id"]: row["text"] for row in read_lines(root / "answers_gpt4.jsonl")}
    ),
    "mmvet": lambda root: truth_by_id(
        {
            int(key.removeprefix("v1_")): " and ".join(row["answer"].split("<AND>"))
            for key, row in read(root / "mm-vet.json").items()
        }
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_every_picture_of_a_benchmark_is_there(name: str, root: Path) -> None:
    questions = BENCHMARKS[name].load(root / FOLDERS[name][1])
    assert len(questions) >= NUM_PICTURES - 2
    assert not any(question.fault for question in questions)
    pictures = {picture for question in questions for picture in question.images}
    assert pictures
    assert all(load_image(picture).size == (PICTURE_SIZE, PICTURE_SIZE) for picture in pictures)


@pytest.mark.parametrize("name", FOLDERS)
def test_right_answers_score_full_marks(name: str, root: Path, tmp_path: Path) -> None:
    task, folder = BENCHMARKS[name], root / FOLDERS[name][1]
    truth = TRUTHS[name](folder)
    rows = [make_row(question, truth(question), "truth", {}) for question in task.load(folder)]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judge = make_judge("exact", None, tmp_path / "judge.jsonl", task) if task.uses_judge != "never" else None
    result = score_answers(task, answers, folder, judge=judge)
    write_result(tmp_path / "result.json", result)
    assert result.headline == pytest.approx(FULL_MARKS.get(name, 100.0))
    assert result.missing == 0


def test_every_benchmark_has_a_writer() -> None:
    assert set(FOLDERS) == set(BENCHMARKS)


def test_circular_rows_turn_options_and_answer_together(root: Path) -> None:
    csv.field_size_limit(2**24)
    with (root / "mmbench/mmbench_dev_20230712.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    for row in rows:
        base = next(each for each in rows if int(each["index"]) == int(row["index"]) % 1_000_000)
        assert row[row["answer"]] == base[base["answer"]]
        assert row["image"] == base["image"]


def test_unanswerable_questions_ask_for_a_shape_that_is_not_there(root: Path) -> None:
    rows = read(root / "vizwiz/val.json")
    assert all(
        (row["answers"][0]["answer"] == sentence.UNANSWERABLE.lower()) == (not row["answerable"]) for row in rows
    )
