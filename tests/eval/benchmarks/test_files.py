"""What holds for all four benchmarks of one image and a short answer: VQAv2, GQA, VizWiz, TextVQA."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava.errors import InputError
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks._files import read_document, take
from llava.eval.predictions import read_answers
from llava.eval.results import format_line, pair_with_questions, score_answers
from llava.files import write_jsonl
from llava.prompt import wrap_prompt

ROWS = {
    "vqav2": "VQAv2 val (Acc)\t68.08",
    "gqa": "GQA (Acc)\t50.39",
    "vizwiz": "VizWiz val (Acc)\t63.01",
    "textvqa": "TextVQA (Acc)\t71.42",
}
COUNTS = {"vqav2": 156, "gqa": 127, "vizwiz": 143, "textvqa": 141}
QUESTION_FILES = {
    "vqav2": "llava_vqav2_mscoco_val2014.jsonl",
    "gqa": "llava_gqa_testdev_balanced.jsonl",
    "vizwiz": "llava_val.jsonl",
    "textvqa": "llava_textvqa_val_v051_ocr.jsonl",
}
ANNOTATION_FILES = {
    "vqav2": "v2_mscoco_val2014_annotations.json",
    "gqa": "testdev_balanced_questions.json",
    "vizwiz": "val.json",
    "textvqa": "TextVQA_0.5.1_val.json",
}
IMAGE_FOLDERS = {"vqav2": "val2014", "gqa": "data/images", "vizwiz": "val", "textvqa": "train_images"}


@pytest.fixture(params=list(ROWS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, golden: Path) -> Path:
    return golden / "oracle" / name


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The benchmark's folder, for a test to spoil."""
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def assert_holds(found: Any, expected: Any, where: str = "") -> None:
    """Every number of `expected` is in `found`, to 1e-6."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key != "note":
                assert key in found, f"{where}/{key}"
                assert_holds(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_holds(one, other, f"{where}/{number}")
    else:
        assert found == (pytest.approx(expected, abs=1e-6) if isinstance(expected, float) else expected), where


def test_every_number_of_the_official_scorer_is_reproduced(name: str, folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    result = score_answers(find_benchmark(name), folder / "answers.jsonl", folder)
    assert_holds(result.scores, expected["main"])
    main = expected["main"].get("accuracy_unrounded", expected["main"]["accuracy"])
    assert result.headline == pytest.approx(main["overall"] if isinstance(main, dict) else main, abs=1e-6)
    assert result.count == COUNTS[name]
    assert format_line(result) == ROWS[name]


def test_every_variant_of_the_official_scorer_is_reproduced(name: str, folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    scores = score_answers(find_benchmark(name), folder / "answers.jsonl", folder).scores
    assert_holds(scores, {key: expected[key] for key in ("raw", "variants") if key in expected})
    assert_holds(scores, expected.get("full", {}))


def test_rounded_numbers_are_equal_to_the_last_digit(name: str, folder: Path) -> None:
    expected = json.loads((folder / "expected.json").read_text())
    scores = score_answers(find_benchmark(name), folder / "answers.jsonl", folder).scores
    for key, part in (("main", scores), ("raw", scores.get("raw"))):
        if key in expected and name != "gqa":
            assert part["accuracy"] == expected[key]["accuracy"]


@pytest.mark.parametrize("num_answers", [None, 100, 37])
def test_the_headline_follows_from_the_verdicts(
    name: str, folder: Path, tmp_path: Path, num_answers: int | None
) -> None:
    task = find_benchmark(name)
    write_jsonl(tmp_path / "some.jsonl", read_answers(folder / "answers.jsonl")[:num_answers])
    _, answers = pair_with_questions(task, tmp_path / "some.jsonl", folder, allow_partial=True)
    scores = task.score(answers, folder)
    assert task.headline(scores.verdicts) == pytest.approx(scores.headline, abs=1e-9)
    assert task.headline(scores.verdicts[::-1]) == pytest.approx(scores.headline, abs=1e-9)
    assert len(scores.verdicts) == scores.count
    if num_answers is None:
        assert scores.count == COUNTS[name]
    # One for each question, found by its key.
    assert len({verdict.key for verdict in scores.verdicts}) == scores.count
    assert all(answers[verdict.key]["text"] == verdict.prediction for verdict in scores.verdicts)
    assert all(0 <= verdict.points <= 1 and verdict.unit == "question" for verdict in scores.verdicts)


def test_prompts_and_queries_are_those_of_llava_in_every_record(name: str, folder: Path) -> None:
    task = find_benchmark(name)
    questions = task.load(folder)
    expected = [json.loads(line) for line in (folder / "expected_prompts.jsonl").read_text().splitlines()]
    for question, recorded in zip(questions, expected, strict=True):
        assert wrap_prompt(question.prompt, len(question.images), "vicuna_v1") == recorded["prompt_sent_to_llm"]
        assert question.query == recorded["trim_text"]
        assert question.head() == {
            "question_id": recorded["question_id"],
            "prompt": recorded["answers_file_prompt"],
        }
        assert task.max_new_tokens == recorded["max_new_tokens"]
        assert question.images[0].parent == folder / IMAGE_FOLDERS[name]


def test_answers_are_paired_by_id_not_by_position(name: str, folder: Path, tmp_path: Path) -> None:
    rows = read_answers(folder / "answers.jsonl")
    random.Random(5).shuffle(rows)
    write_jsonl(tmp_path / "shuffled.jsonl", rows)
    shuffled = score_answers(find_benchmark(name), tmp_path / "shuffled.jsonl", folder)
    right = score_answers(find_benchmark(name), folder / "answers.jsonl", folder)
    assert shuffled.headline == pytest.approx(right.headline, abs=1e-9)
    assert shuffled.columns == pytest.approx(right.columns, abs=1e-9)


def test_missing_answers_are_refused_unless_allowed(name: str, folder: Path, tmp_path: Path) -> None:
    rows = read_answers(folder / "answers.jsonl")
    write_jsonl(tmp_path / "some.jsonl", rows[:100])
    with pytest.raises(InputError, match=rf"lacks {len(rows) - 100} of {len(rows)} answers"):
        score_answers(find_benchmark(name), tmp_path / "some.jsonl", folder)
    partial = score_answers(find_benchmark(name), tmp_path / "some.jsonl", folder, allow_partial=True)
    assert partial.missing == len(rows) - 100
    assert 80 < partial.count <= 100


def test_no_answer_at_all_is_refused_even_if_partial(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(InputError, match=r"none of the (balanced )?questions has an answer"):
        score_answers(find_benchmark(name), tmp_path / "none.jsonl", folder, allow_partial=True)


def test_questions_load_without_annotations_and_images(name: str, copied: Path) -> None:
    (copied / ANNOTATION_FILES[name]).unlink()
    task = find_benchmark(name)
    if name in ("vqav2", "vizwiz"):
        task = task.with_split("val")
    assert len(task.load(copied)) == len(read_answers(copied / "answers.jsonl"))
    with pytest.raises(
        InputError, match=rf"no such file: .*{ANNOTATION_FILES[name]}; `python -m llava.eval download TASK` fetches it"
    ):
        score_answers(task, copied / "answers.jsonl", copied)


def test_a_root_without_files_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"no such file: {tmp_path}/\S+\.jsonl; [^\n]*$"):
        find_benchmark(name).load(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"[1]", b"{}", b'{"data": [7], "annotations": [{}]}', b'["\xff"]'])
def test_a_spoiled_annotation_file_is_named_in_one_line(name: str, copied: Path, content: bytes) -> None:
    path = copied / ANNOTATION_FILES[name]
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^[^\n]*{path}[^\n]*$"):
        score_answers(find_benchmark(name), copied / "answers.jsonl", copied)


def test_a_record_without_image_is_a_fault(name: str, copied: Path) -> None:
    file = copied / QUESTION_FILES[name]
    file.write_text(file.read_text().replace('"image"', '"picture"', 1))
    faults = [question.fault for question in find_benchmark(name).load(copied)]
    assert faults[0] == "the record has no image"
    assert not any(faults[1:])


def test_a_broken_question_costs_its_own_answer_only(name: str, copied: Path) -> None:
    file = copied / QUESTION_FILES[name]
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join(["{broken", *rest]))
    lost = json.loads(first)
    rows = read_answers(copied / "answers.jsonl")
    kept = [row for row in rows if (row["question_id"], row["prompt"]) != (lost["question_id"], lost["text"])]
    write_jsonl(copied / "rest.jsonl", kept)
    result = score_answers(find_benchmark(name), copied / "rest.jsonl", copied, allow_partial=True)
    assert result.missing == 1
    assert result.count >= COUNTS[name] - 1


def test_a_second_question_file_does_not_pass_for_the_annotated_one(name: str, copied: Path) -> None:
    file = copied / QUESTION_FILES[name]
    lines = file.read_text().splitlines()
    foreign = json.loads(lines[0]) | {"image": "other.jpg", "text": "Why?\nAnswer."}
    foreign["question_id"] = "7777" if isinstance(foreign["question_id"], str) else 7777
    file.write_text("\n".join([*lines, json.dumps(foreign)]))
    rows = read_answers(copied / "answers.jsonl")
    foreign_row = rows[0] | {"question_id": foreign["question_id"], "prompt": foreign["text"]}
    write_jsonl(copied / "answers.jsonl", [*rows, foreign_row])
    with pytest.raises(InputError, match=rf"{ANNOTATION_FILES[name]} has no (annotation of 1|question)"):
        score_answers(find_benchmark(name), copied / "answers.jsonl", copied)


@pytest.mark.parametrize("missing", [0, -1])
def test_questions_that_are_not_asked_are_noticed(name: str, copied: Path, missing: int) -> None:
    if name == "textvqa":
        pytest.skip("its official script scores any subset")
    file = copied / QUESTION_FILES[name]
    lines = file.read_text().splitlines()
    dropped = json.loads(lines.pop(missing))
    file.write_text("\n".join(lines))
    rows = [row for row in read_answers(copied / "answers.jsonl") if row["question_id"] != dropped["question_id"]]
    write_jsonl(copied / "answers.jsonl", rows)
    with pytest.raises(InputError, match="annotates 1 questions that the question file does not ask"):
        score_answers(find_benchmark(name), copied / "answers.jsonl", copied)


def test_an_annotation_field_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(InputError, match='here: "n" must be a whole number'):
        take({"n": True}, "n", int, "here")
    with pytest.raises(InputError, match='here: "n" must be a list'):
        take(None, "n", list, "here")


def test_annotations_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('"é"'.encode())
    assert read_document(tmp_path / "a.json") == "é"


SCRIPTS = {
    "vqav2.sh": "vqav2/answers/llava_vqav2_mscoco_test-dev2015/run-1/merge.jsonl",
    "gqa.sh": "gqa/answers/llava_gqa_testdev_balanced/run-1/merge.jsonl",
    "vizwiz.sh": "vizwiz/answers/run-1.jsonl",
    "textvqa.sh": "textvqa/answers/run-1/merge.jsonl",
    "testvqa.sh": "textvqa/answers/run-1/merge.jsonl",
}


PLACES = {
    ("vqav2", "val"): ("answers/llava_vqav2_mscoco_val2014/run-1/merge.jsonl", None),
    ("vqav2", "test"): (
        "answers/llava_vqav2_mscoco_test-dev2015/run-1/merge.jsonl",
        "answers_upload/llava_vqav2_mscoco_test-dev2015/run-1",
    ),
    ("vqav2", "test2015"): (
        "answers/llava_vqav2_mscoco_test2015/run-1/merge.jsonl",
        "answers_upload/llava_vqav2_mscoco_test2015/run-1",
    ),
    ("vizwiz", "val"): ("answers/val/run-1.jsonl", None),
    ("vizwiz", "test"): ("answers/run-1.jsonl", "answers_upload/run-1"),
    ("gqa", None): (
        "answers/llava_gqa_testdev_balanced/run-1/merge.jsonl",
        "answers/llava_gqa_testdev_balanced/run-1",
    ),
    ("textvqa", None): ("answers/run-1/merge.jsonl", None),
}
"""Of the answers and the upload of the run `run-1`, by benchmark and split."""


@pytest.mark.parametrize("task_and_split", PLACES)
def test_answers_and_uploads_go_where_the_scripts_of_llava_put_them(
    tmp_path: Path, task_and_split: tuple[str, str | None]
) -> None:
    name, split = task_and_split
    task = find_benchmark(name) if split is None else find_benchmark(name).with_split(split)
    answers, upload = PLACES[task_and_split]
    root = task.find_root(tmp_path)
    assert root == tmp_path / name
    assert task.place_answers(root, "run-1") == root / answers
    assert task.place_upload(root, "run-1") == (None if upload is None else root / upload)


@pytest.mark.parametrize(
    ("name", "annotations", "scored", "served"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", ("vqav2", "val"), ("vqav2", "test")),
        ("vizwiz", "val.json", ("vizwiz", "val"), ("vizwiz", "test")),
        ("vizwiz", "Annotations/val.json", ("vizwiz", "val"), ("vizwiz", "test")),
    ],
)
def test_answers_go_to_the_split_that_can_be_scored_where_its_annotations_are(
    tmp_path: Path, name: str, annotations: str, scored: tuple[str, str], served: tuple[str, str]
) -> None:
    task = find_benchmark(name)
    for key in (served, scored):
        answers, upload = PLACES[key]
        assert task.place_answers(tmp_path, "run-1") == tmp_path / answers
        assert task.place_upload(tmp_path, "run-1") == (None if upload is None else tmp_path / upload)
        (tmp_path / annotations).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / annotations).write_text("{}")


def dry_run(repository: Path, script: str, *options: str, root: Path) -> str:
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    command = ["bash", repository / "scripts/v1_5/eval" / script, "run-1", root / "model", *options]
    environment = {
        "DRY_RUN": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": "/usr/bin:/bin",
        "PYTHON": sys.executable,
        "LLAVA_EVAL_ROOT": str(root),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("script", "answers"), SCRIPTS.items())
def test_scripts_write_the_answers_where_those_of_llava_do(
    repository: Path, tmp_path: Path, script: str, answers: str
) -> None:
    assert f"--answers {tmp_path}/{answers} " in dry_run(repository, script, root=tmp_path)


@pytest.mark.parametrize(
    ("script", "annotations", "answers", "upload"),
    [
        ("vqav2.sh", "vqav2/v2_mscoco_val2014_annotations.json", "vqav2/answers/llava_vqav2_mscoco_val2014/", "vqav2"),
        ("vizwiz.sh", "vizwiz/val.json", "vizwiz/answers/val/", "vizwiz"),
        ("vizwiz.sh", "vizwiz/Annotations/val.json", "vizwiz/answers/val/", "vizwiz"),
    ],
)
def test_scripts_take_the_split_that_can_be_scored_where_its_annotations_are(
    repository: Path, tmp_path: Path, script: str, annotations: str, answers: str, upload: str
) -> None:
    (tmp_path / annotations).parent.mkdir(parents=True)
    (tmp_path / annotations).write_text("{}")
    printed = dry_run(repository, script, root=tmp_path)
    assert f"--answers {tmp_path}/{answers}" in printed
    assert "export" not in printed
    shutil.rmtree(tmp_path / "model")
    printed = dry_run(repository, script, "--", "--split", "test", root=tmp_path)
    assert answers not in printed
    assert f"{tmp_path}/{upload}/answers_upload/" in printed
    assert printed.count("--split test") == len(printed.splitlines())
