from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.answers import (
    ANSWER_ID_ALPHABET,
    dump_row,
    make_answer_id,
    make_row,
    name_questions,
    pair_answers,
    parse_rows,
    read_answers,
    write_answers,
)
from llava.eval.benchmark import Question

QUESTION = Question(id="7", prompt="Is it?\nAnswer.", query="Is it?", images=(Path("a.jpg"),))


def test_a_row_has_the_published_columns_in_the_published_order() -> None:
    row = make_row(QUESTION, "Yes", "llava", {"num_tokens": 4})
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (row["question_id"], row["prompt"], row["text"]) == ("7", "Is it?\nAnswer.", "Yes")
    assert row["metadata"] == {"num_tokens": 4}


def test_a_benchmark_may_record_another_prompt_and_add_columns() -> None:
    question = Question(id=7, prompt="Is it?\nAnswer.", record="Is it?", fields={"round_id": 2, "options": ["a"]})
    row = make_row(question, "A", "llava", {})
    assert (row["prompt"], row["round_id"], row["options"]) == ("Is it?", 2, ["a"])


def test_answer_ids_look_like_the_published_ones_and_never_change() -> None:
    identity = make_answer_id("llava", QUESTION)
    assert len(identity) == 22
    assert set(identity) <= set(ANSWER_ID_ALPHABET)
    assert identity == make_answer_id("llava", QUESTION) == "js2CTDUVDf7JQYmMhctpSF"
    assert identity != make_answer_id("llava-2", QUESTION)
    assert identity != make_answer_id("llava", Question(id=7, prompt=QUESTION.prompt))


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_last_line_is_ignored(cut: int) -> None:
    row = make_row(QUESTION, "Yes\nand “no”", "llava", {})
    content = (dump_row(row) * 2).encode()
    assert parse_rows(content, "x") == [row, row]
    assert parse_rows(content[:-1], "x") == [row, row]
    assert parse_rows(content[: -1 - cut], "x") == [row]


@pytest.mark.parametrize("line", ["{", "[]", '{"question_id": 1}', '{"text": "a"}', '{"question_id": 1, "text": null}'])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    row = make_row(QUESTION, "Yes", "llava", {})
    file = tmp_path / "answers.jsonl"
    file.write_text(f"{dump_row(row)}{line}\n{dump_row(row)}")
    with pytest.raises(InputError, match=r"answers.jsonl line 2 is not"):
        read_answers(file)


def test_a_missing_answers_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no answers file .*answers.jsonl"):
        read_answers(tmp_path / "answers.jsonl")


def test_writing_leaves_no_half_file_behind(tmp_path: Path) -> None:
    file = tmp_path / "new" / "answers.jsonl"
    rows = [make_row(QUESTION, "Yes", "llava", {})]
    write_answers(file, rows)

    def failing() -> object:
        yield rows[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_answers(file, failing())
    assert read_answers(file) == rows


def test_equal_answers_to_one_question_count_once() -> None:
    row = make_row(QUESTION, "Yes", "llava", {})
    assert len(pair_answers([QUESTION], [row, row], ("question_id",))) == 1


def test_questions_that_share_an_id_are_told_apart_by_their_prompt() -> None:
    questions = [Question(id="a", prompt="One?"), Question(id="a", prompt="Two?")]
    rows = [make_row(question, question.prompt, "llava", {}) for question in questions]
    paired = pair_answers(questions, reversed(rows), ("question_id", "prompt"))
    assert sorted(row["text"] for row in paired.values()) == ["One?", "Two?"]


def test_many_questions_are_named_by_the_first_few() -> None:
    questions = [Question(id=number) for number in range(9)]
    assert name_questions(questions[:2]) == "0, 1"
    assert name_questions(questions) == "0, 1, 2, 3, 4 and 4 more"
