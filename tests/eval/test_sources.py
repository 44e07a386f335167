import json
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmarks._files import load_question_file, read_records


def load(tmp_path: Path, *lines: str | dict) -> list:
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return load_question_file(file, tmp_path / "images")


GOOD = {"question_id": 7, "image": "a.jpg", "text": "Is it?", "category": "popular"}


def test_a_record_becomes_a_question(tmp_path: Path) -> None:
    (question,) = load(tmp_path, GOOD)
    assert (question.id, question.prompt, question.query, question.category) == (7, "Is it?", "Is it?", "popular")
    assert question.images == (tmp_path / "images" / "a.jpg",)
    assert question.fault is None


def test_ids_keep_their_json_type(tmp_path: Path) -> None:
    questions = load(tmp_path, GOOD, GOOD | {"question_id": "7"})
    assert [question.id for question in questions] == [7, "7"]


def test_several_images_and_none_are_read(tmp_path: Path) -> None:
    questions = load(tmp_path, GOOD | {"image": ["a.jpg", "b.jpg"]}, {"question_id": 8, "text": "Why?"})
    assert [len(question.images) for question in questions] == [2, 0]


@pytest.mark.parametrize(
    ("record", "identity", "words"),
    [
        ('{"question_id": 1, "im', "questions.jsonl line 2", "is not JSON"),
        ("[1, 2]", "questions.jsonl line 2", "a JSON object is needed, not list"),
        ({"image": "a.jpg", "text": "x"}, "questions.jsonl line 2", '"question_id" must be'),
        (GOOD | {"question_id": True}, "questions.jsonl line 2", '"question_id" must be'),
        (GOOD | {"text": None}, 7, '"text" must be a string'),
        (GOOD | {"text": None, "category": {}}, 7, '"category" must be a string'),
        (GOOD | {"image": 3}, 7, '"image" must be a file name'),
        (GOOD | {"image": ""}, 7, '"image" must be a file name'),
    ],
)
def test_a_broken_record_becomes_a_fault_and_spares_the_others(
    tmp_path: Path, record: str | dict, identity: int | str, words: str
) -> None:
    good, broken, other = load(tmp_path, GOOD | {"question_id": 1}, record, GOOD | {"question_id": 3})
    assert good.fault is None
    assert other.fault is None
    assert broken.id == identity
    assert words in broken.fault


def test_a_file_without_a_sound_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a question file: questions.jsonl line 1: is not JSON"):
        load(tmp_path, "index\tquestion", "1\tWhy?")


def test_missing_empty_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file: .*questions.jsonl; `python -m llava.eval download TASK`"):
        load_question_file(tmp_path / "questions.jsonl", tmp_path)
    with pytest.raises(InputError, match="is empty"):
        load(tmp_path, "", "  ")
    (tmp_path / "questions.jsonl").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_question_file(tmp_path / "questions.jsonl", tmp_path)


def test_annotation_files_must_be_intact(tmp_path: Path) -> None:
    file = tmp_path / "labels.json"
    file.write_text('{"a": 1}\n\n{"a": \n')
    with pytest.raises(InputError, match=r"labels.json line 3 is not JSON"):
        read_records(file)
