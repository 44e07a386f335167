import json
import runpy
import shutil
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmarks.vqav2 import Vqav2
from llava.eval.predictions import read_answers
from llava.eval.results import export_answers, pair_with_questions, score_answers
from llava.files import write_jsonl

VQAV2 = Vqav2()
TEST_DEV = "llava_vqav2_mscoco_test-dev2015"


@pytest.fixture
def folder(golden: Path) -> Path:
    return golden / "oracle" / "vqav2"


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A VQAv2 folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "vqav2"))


@pytest.mark.parametrize(
    ("split", "answers", "expected"),
    [
        ("test", "answers_testdev.jsonl", "expected_upload_testdev.json"),
        ("test-dev2015", "answers_testdev.jsonl", "expected_upload_testdev.json"),
        ("val", "answers.jsonl", "expected_upload_val.json"),
        ("val2014", "answers.jsonl", "expected_upload_val.json"),
    ],
)
def test_uploads_equal_those_of_llava_byte_for_byte(
    folder: Path, tmp_path: Path, split: str, answers: str, expected: str
) -> None:
    (file,) = export_answers(VQAV2.with_split(split), folder / answers, folder, tmp_path / "out")
    assert file.read_bytes() == (folder / expected).read_bytes()
    assert not list(file.parent.glob("*.partial"))


def test_an_upload_lists_every_question_of_the_test_split_in_its_order(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", read_answers(folder / "answers_testdev.jsonl")[:1])
    (file,) = export_answers(VQAV2.with_split("test"), tmp_path / "one.jsonl", folder, tmp_path, allow_partial=True)
    upload = json.loads(file.read_text())
    listed = [json.loads(line)["question_id"] for line in (folder / "llava_vqav2_mscoco_test2015.jsonl").open()]
    assert [entry["question_id"] for entry in upload] == listed
    assert [entry["answer"] for entry in upload if entry["answer"]] == ["cactus"]


def test_an_incomplete_upload_is_refused(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "some.jsonl", read_answers(folder / "answers_testdev.jsonl")[1:])
    with pytest.raises(InputError, match="lacks 1 of 40 answers"):
        export_answers(VQAV2.with_split("test"), tmp_path / "some.jsonl", folder, tmp_path / "out")


def test_without_the_list_of_the_test_split_there_is_no_upload(copied: Path, tmp_path: Path) -> None:
    (copied / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    with pytest.raises(InputError, match=r"no such file: .*llava_vqav2_mscoco_test2015.jsonl"):
        export_answers(VQAV2.with_split("test"), copied / "answers_testdev.jsonl", copied, tmp_path)


def test_a_question_that_the_upload_does_not_list_is_noticed(copied: Path, tmp_path: Path) -> None:
    (copied / "llava_vqav2_mscoco_test2015.jsonl").write_text('{"question_id": 1}\n')
    with pytest.raises(InputError, match="40 answers are to questions that the upload does not list"):
        export_answers(VQAV2.with_split("test"), copied / "answers_testdev.jsonl", copied, tmp_path)


def test_val_is_taken_where_its_annotations_are_else_test_dev(copied: Path) -> None:
    assert len(VQAV2.load(copied)) == 156
    (copied / "v2_mscoco_val2014_annotations.json").unlink()
    questions = VQAV2.load(copied)
    assert len(questions) == 40
    assert {question.images[0].parent for question in questions} == {copied / "test2015"}


def test_a_named_split_holds_whatever_is_in_the_folder(folder: Path) -> None:
    assert len(VQAV2.with_split("test").load(folder)) == 40
    assert len(VQAV2.with_split("test2015").load(folder)) == 52
    assert len(VQAV2.with_split("test").with_split("val").load(folder)) == 156


def test_test_splits_are_scored_by_the_server_only(folder: Path) -> None:
    with pytest.raises(InputError, match=r"vqav2: only EvalAI challenge 830 \(VQA\) can score this split"):
        score_answers(VQAV2.with_split("test"), folder / "answers_testdev.jsonl", folder)


def test_an_unknown_split_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no split 'train'; known: val2014, test-dev2015, test2015"):
        VQAV2.with_split("train")


def test_questions_built_from_the_official_file_are_those_of_the_llava_file(copied: Path) -> None:
    expected = VQAV2.load(copied)
    (copied / "llava_vqav2_mscoco_val2014.jsonl").unlink()
    assert VQAV2.load(copied) == expected


def test_a_broken_official_question_is_a_fault(copied: Path) -> None:
    (copied / "llava_vqav2_mscoco_val2014.jsonl").unlink()
    file = copied / "v2_OpenEnded_mscoco_val2014_questions.json"
    file.write_text(file.read_text().replace('"image_id"', '"picture"', 1))
    assert [question.fault for question in VQAV2.load(copied) if question.fault] == [
        'v2_OpenEnded_mscoco_val2014_questions.json question 0: "image_id" must be a whole number'
    ]


def test_a_question_id_of_another_json_type_finds_its_question(folder: Path, tmp_path: Path) -> None:
    rows = [row | {"question_id": str(row["question_id"])} for row in read_answers(folder / "answers.jsonl")]
    write_jsonl(tmp_path / "strings.jsonl", rows)
    turned, right = (
        score_answers(VQAV2, path, folder) for path in (tmp_path / "strings.jsonl", folder / "answers.jsonl")
    )
    assert turned.scores == right.scores
    (file,) = export_answers(VQAV2, tmp_path / "strings.jsonl", folder, tmp_path)
    assert file.read_bytes() == (folder / "expected_upload_val.json").read_bytes()


def test_verdicts_hold_the_ten_answers_and_what_the_answer_is_worth(folder: Path) -> None:
    _, answers = pair_with_questions(VQAV2, folder / "answers.jsonl", folder)
    verdicts = {verdict.key: verdict for verdict in VQAV2.score(answers, folder).verdicts}
    shirt, kettle, one = verdicts["[485968000]"], verdicts["[112712011]"], verdicts["[391973009]"]
    # Five of ten people say "t-shirt" and two "t shirt", which the scorer reads alike.
    assert (shirt.prediction, shirt.parsed, shirt.points, shirt.correct) == ("T-shirt", "t shirt", 1.0, True)
    assert shirt.reference == ("t-shirt", "tshirt", "t shirt")
    # Two of ten people say "kettle".
    assert (kettle.prediction, kettle.parsed, kettle.points) == ("An kettle", "kettle", pytest.approx(0.6))
    assert kettle.reference == ("bucket", "teapot", "kettle")
    assert (one.prediction, one.parsed, one.points, one.correct) == ("the 1", "1", 0.0, False)
    assert (one.reference, one.category) == (("violin", "meadow"), "other")


def test_an_annotation_without_answers_is_named(copied: Path) -> None:
    file = copied / "v2_mscoco_val2014_annotations.json"
    document = json.loads(file.read_text())
    document["annotations"][3]["answers"] = []
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r'annotations.json annotation 3: "answers" is empty'):
        score_answers(VQAV2, copied / "answers.jsonl", copied)


def convert(repository: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["convert", *map(str, arguments)])
    runpy.run_path(str(repository / "scripts" / "convert_vqav2_for_submission.py"))["main"]()


def test_llavas_conversion_command_writes_the_file_of_llava(
    repository: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    answers = copied / "answers" / TEST_DEV / "llava-v1.5-13b" / "merge.jsonl"
    answers.parent.mkdir(parents=True)
    shutil.copy(copied / "answers_testdev.jsonl", answers)
    convert(repository, monkeypatch, "--dir", copied, "--ckpt", "llava-v1.5-13b", "--split", TEST_DEV)
    upload = copied / "answers_upload" / TEST_DEV / "llava-v1.5-13b.json"
    assert upload.read_bytes() == (copied / "expected_upload_testdev.json").read_bytes()
    assert capsys.readouterr().out == "total results: 40, total split: 52, error_line: 0\n"


def test_llavas_conversion_command_skips_no_broken_line(
    repository: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = copied / "answers" / TEST_DEV / "run" / "merge.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("{broken\n" + (copied / "answers_testdev.jsonl").read_text())
    with pytest.raises(InputError, match=r"merge.jsonl line 1 is not JSON"):
        convert(repository, monkeypatch, "--dir", copied, "--ckpt", "run", "--split", TEST_DEV)
