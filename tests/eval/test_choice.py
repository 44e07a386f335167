import pytest

from llava.eval.metrics.choice import (
    ChoiceRow,
    infer_letter,
    infer_letter_opencompass,
    judge_group,
    parse_science_answer,
)

OPTIONS = {"A": "a cat", "B": "a dog", "C": "the sea", "D": "the sky"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("A. ", "A"),
        ("B. wool", "B"),
        ("The answer is C.", "C"),
        ("I think. The answer is C, of course", "C"),
        ("The answer is Z.", "Z"),
        ("The answer is C", "FAILED"),
        ("The answer is C. The answer is C.", "FAILED"),
        ("A.", "FAILED"),
        ("A.b", "FAILED"),
        ("(A)", "FAILED"),
        ("a", "FAILED"),
        (" A", "FAILED"),
        ("F", "FAILED"),
        ("F. wool", "FAILED"),
        ("AB", "FAILED"),
        ("", "FAILED"),
    ],
)
def test_science_answers_are_read_as_the_published_script_reads_them(text: str, letter: str) -> None:
    assert parse_science_answer(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("The answer is B.", "B"),
        ("B B", "B"),
        ("B one two three", "B"),
        ("B one two three four", None),
        ("A or B", None),
        ("b", None),
        ("Z", "Z"),
        ("E", None),
        ("MY A DOG", "A"),
        ("MY a DOG", "B"),
        ("the SKY", "D"),
        ("the sky or the sea", None),
        ("nan", None),
        ("Cannot determine the answer B", "Z"),
        ("Failed to obtain answer via API B", None),
    ],
)
def test_letters_are_inferred_as_vlmevalkit_infers_them(text: str, letter: str | None) -> None:
    assert infer_letter(text, OPTIONS) == letter


def test_a_long_answer_is_not_searched_for_an_options_text() -> None:
    room = 2 * sum(map(len, OPTIONS.values()))
    assert infer_letter("the sky".ljust(room, "!"), OPTIONS) == "D"
    assert infer_letter("the sky".ljust(room + 1, "!"), OPTIONS) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("E", "E"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("(A) or B,", "B"),
        ("B one two three four", "B"),
        ("A is it", "A"),
        ("A photo of the sky", "D"),
        ("A photo with B:", "B"),
        ("A or B", None),
        ("B!", None),
        ("THE SKY".ljust(200, "!"), "D"),
    ],
)
def test_letters_are_inferred_as_the_first_mmbench_script_infers_them(text: str, letter: str | None) -> None:
    assert infer_letter_opencompass(text, OPTIONS) == letter


def make_rows(*predictions: str) -> list[ChoiceRow]:
    return [ChoiceRow(str(k), "?", OPTIONS, "B", text, k == 0) for k, text in enumerate(predictions)]


def test_a_wrong_letter_decides_before_a_judge_is_asked() -> None:
    assert judge_group(make_rows("hm", "A"), infer_letter, settle=lambda row: "B") == (False, [])


def test_without_a_judge_a_row_that_cannot_be_read_makes_the_question_wrong() -> None:
    assert judge_group(make_rows("B", "hm"), infer_letter) == (False, [])
    assert judge_group(make_rows("B", "B"), infer_letter) == (True, [])


def test_a_judge_is_asked_in_turn_until_a_row_is_wrong() -> None:
    replies = {"0": "B", "2": "A", "3": "B"}
    outcome = judge_group(make_rows("hm", "B", "hm", "hm"), infer_letter, settle=lambda row: replies[row.name])
    assert outcome == (False, ["0", "2"])
