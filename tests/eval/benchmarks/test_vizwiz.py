import json
import runpy
import shutil
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmarks._files import PeopleAnswers
from llava.eval.benchmarks.vizwiz import VizWiz, summarize_answers
from llava.eval.predictions import read_answers
from llava.eval.results import export_answers, pair_with_questions, score_answers
from llava.files import write_jsonl

VIZWIZ = VizWiz()


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "oracle" / "vizwiz"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A VizWiz folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "vizwiz"))


def test_uploads_equal_those_of_llava_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    (file,) = export_answers(VIZWIZ, folder / "answers.jsonl", folder, tmp_path / "out")
    assert file.name == "vizwiz_val.json"
    assert file.read_bytes() == (folder / "expected_upload.json").read_bytes()


def test_an_upload_needs_an_answer_to_every_question(folder: Path, tmp_path: Path) -> None:
    rows = [row for row in read_answers(folder / "answers.jsonl") if row["question_id"] != 7]
    write_jsonl(tmp_path / "some.jsonl", rows)
    with pytest.raises(InputError, match="question 7 has no answer"):
        export_answers(VIZWIZ, tmp_path / "some.jsonl", folder, tmp_path, allow_partial=True)


def test_val_is_taken_where_its_annotations_are_else_test(copied: Path) -> None:
    assert {question.images[0].parent.name for question in VIZWIZ.load(copied)} == {"val"}
    (copied / "val.json").unlink()
    with pytest.raises(InputError, match=r"no such file: .*llava_test.jsonl"):
        VIZWIZ.load(copied)
    shutil.copy(copied / "llava_val.jsonl", copied / "llava_test.jsonl")
    assert {question.images[0].parent.name for question in VIZWIZ.load(copied)} == {"test"}


def test_the_test_split_is_scored_by_the_server_only(copied: Path) -> None:
    shutil.copy(copied / "llava_val.jsonl", copied / "llava_test.jsonl")
    with pytest.raises(InputError, match=r"vizwiz: only EvalAI challenge 2185 .* can score this split"):
        score_answers(VIZWIZ.with_split("test"), copied / "answers.jsonl", copied)


def test_an_unknown_split_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no split 'train'; known: val, test"):
        VIZWIZ.with_split("train")


@pytest.mark.parametrize("split", ["val", "test"])
def test_questions_built_from_the_official_file_are_those_of_the_llava_file(copied: Path, split: str) -> None:
    expected = VIZWIZ.load(copied)
    (copied / "llava_val.jsonl").unlink()
    document = json.loads((copied / "val.json").read_text())
    for record in document:
        record["question"] = record["question"].upper()
    (copied / f"{split}.json").write_text(json.dumps(document))
    built = VIZWIZ.with_split(split).load(copied)
    assert [(each.id, each.prompt, each.query) for each in built] == [
        (each.id, each.prompt, each.query) for each in expected
    ]
    assert [each.images[0].name for each in built] == [each.images[0].name for each in expected]
    assert {each.images[0].parent for each in built} == {copied / split}


def test_the_official_files_may_stay_in_their_own_folder(copied: Path) -> None:
    (copied / "Annotations").mkdir()
    (copied / "val.json").rename(copied / "Annotations" / "val.json")
    assert score_answers(VIZWIZ, copied / "answers.jsonl", copied).count == 143


def test_annotations_are_found_by_image_not_by_position(copied: Path) -> None:
    right = score_answers(VIZWIZ, copied / "answers.jsonl", copied)
    document = json.loads((copied / "val.json").read_text())
    (copied / "val.json").write_text(json.dumps(document[::-1]))
    assert score_answers(VIZWIZ, copied / "answers.jsonl", copied).columns == pytest.approx(right.columns)


def test_verdicts_hold_the_ten_answers_and_what_the_answer_is_worth(folder: Path) -> None:
    _, answers = pair_with_questions(VIZWIZ, folder / "answers.jsonl", folder)
    verdicts = {verdict.key: verdict for verdict in VIZWIZ.score(answers, folder).verdicts}
    spots = {
        # The upload says "0", as four of ten people do.
        "[2]": ("None", "0", ("0", "1", "none"), 1.0, "number"),
        # Three of ten people say it.
        "[41]": ("unanswerable", "unanswerable", ("tractor", "unanswerable", "unsuitable image"), 0.9, "other"),
        # The upload lacks the comma, and no reference answer is written like that.
        "[13]": ("red,maroon", "redmaroon", ("red,maroon", "red", "red maroon"), 0.0, "other"),
    }
    for key, (prediction, parsed, reference, points, category) in spots.items():
        each = verdicts[key]
        assert (each.prediction, each.parsed, each.reference) == (prediction, parsed, reference)
        assert (each.points, each.category) == (pytest.approx(points), category)


def test_two_questions_about_one_image_are_refused(copied: Path) -> None:
    file = copied / "llava_val.jsonl"
    lines = file.read_text().splitlines()
    twin = json.loads(lines[4]) | {"question_id": 7777}
    file.write_text("\n".join([*lines, json.dumps(twin)]))
    rows = read_answers(copied / "answers.jsonl")
    write_jsonl(copied / "answers.jsonl", [*rows, rows[0] | {"question_id": 7777}])
    with pytest.raises(InputError, match=r"several questions are about VizWiz_val_00000004.jpg"):
        score_answers(VIZWIZ, copied / "answers.jsonl", copied)


def convert(repository: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    runpy.run_path(str(repository / "scripts" / "convert_vizwiz_for_submission.py"))["main"]()


def test_llavas_conversion_command_writes_the_file_of_llava(
    repository: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    upload = tmp_path / "answers_upload" / "run.json"
    arguments = ["--annotation-file", folder / "llava_val.jsonl", "--result-file", folder / "answers.jsonl"]
    convert(repository, monkeypatch, *arguments, "--result-upload-file", upload)
    assert upload.read_bytes() == (folder / "expected_upload.json").read_bytes()
    assert capsys.readouterr().out == "total results: 143, total split: 143, error_line: 0\n"


def test_only_the_word_alone_calls_a_question_unanswerable() -> None:
    answered = {name: PeopleAnswers(["mug"] * 10, "other", answerable=False) for name in ("a", "b", "c", "d")}
    texts = ["Unanswerable.", "unanswerable mug", "answerable", "the unanswerable"]
    found = summarize_answers(answered, texts, [0.0] * 4)["unanswerability_unrounded"]
    assert found["f1_score"] == pytest.approx(100 * 2 / 3)
