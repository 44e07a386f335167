import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval import eval_pope
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks.pope import Pope
from llava.eval.metrics.yes_no import parse_yes_no
from llava.eval.predictions import read_answers
from llava.eval.results import format_line, score_answers
from llava.files import write_jsonl

POPE = Pope()


@pytest.fixture
def copied(oracle: Path, tmp_path: Path) -> Path:
    """A POPE folder that a test may spoil."""
    folder = tmp_path / "pope"
    shutil.copytree(oracle, folder)
    return folder


def assert_equal_numbers(found: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for name in expected:
            assert_equal_numbers(found[name], expected[name])
    else:
        assert found == pytest.approx(expected, abs=1e-6)


def test_every_number_of_the_official_script_is_reproduced(oracle: Path) -> None:
    expected = json.loads((oracle / "expected.json").read_text())
    result = score_answers(POPE, oracle / "answers.jsonl", oracle)
    assert_equal_numbers(result.scores, expected["main"])
    assert result.headline == pytest.approx(expected["main"]["average_f1"], abs=1e-6)
    assert result.count == expected["n_questions"]
    assert format_line(result) == expected["trim_results_line"]


def test_every_answer_is_read_as_the_official_script_reads_it(oracle: Path) -> None:
    expected = json.loads((oracle / "expected.json").read_text())["parsed_answers"]
    answers = read_answers(oracle / "answers.jsonl")
    assert {str(row["question_id"]): parse_yes_no(row["text"]) for row in answers} == expected


def test_answers_are_paired_by_id_not_by_position(oracle: Path, tmp_path: Path) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    random.Random(3).shuffle(rows)
    write_jsonl(tmp_path / "shuffled.jsonl", rows)
    shuffled = score_answers(POPE, tmp_path / "shuffled.jsonl", oracle)
    assert shuffled.scores == score_answers(POPE, oracle / "answers.jsonl", oracle).scores


def test_missing_answers_are_refused_unless_allowed(oracle: Path, tmp_path: Path) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    write_jsonl(tmp_path / "some.jsonl", rows[:150])
    with pytest.raises(InputError, match=r"lacks 26 of 176 answers \(question \d+, .* and 21 more\).*--allow-partial"):
        score_answers(POPE, tmp_path / "some.jsonl", oracle)
    partial = score_answers(POPE, tmp_path / "some.jsonl", oracle, allow_partial=True)
    assert (partial.count, partial.missing) == (150, 26)
    assert format_line(partial).startswith("POPE (Avg. F1) [26 answers missing]\t")


def test_the_order_of_missing_answers_does_not_shift_the_labels(oracle: Path, tmp_path: Path) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    right = json.loads((oracle / "expected.json").read_text())["main"]["categories"]["random"]
    write_jsonl(tmp_path / "some.jsonl", rows[5:])
    partial = score_answers(POPE, tmp_path / "some.jsonl", oracle, allow_partial=True)
    assert_equal_numbers(partial.scores["categories"]["random"], right)


def test_no_answer_at_all_is_refused_even_if_partial(oracle: Path, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(InputError, match="none of the questions has an answer"):
        score_answers(POPE, tmp_path / "none.jsonl", oracle, allow_partial=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"question_id": 999}, r"belongs to no question of this benchmark: question_id = \[999\]"),
        ({"question_id": "999"}, r'belongs to no question of this benchmark: question_id = \["999"\]'),
        ({"question_id": "1", "text": "No"}, r"two different answers to one question: question_id = \[1\]"),
        ({"text": "No"}, r"two different answers to one question: question_id = \[1\]"),
    ],
)
def test_foreign_and_contradicting_answers_are_refused(oracle: Path, tmp_path: Path, change: dict, words: str) -> None:
    rows = read_answers(oracle / "answers.jsonl")
    write_jsonl(tmp_path / "answers.jsonl", [*rows, rows[0] | change])
    with pytest.raises(InputError, match=words):
        score_answers(POPE, tmp_path / "answers.jsonl", oracle)


def test_the_latest_random_file_is_refused_with_the_commit_to_take(make_pope: Callable[..., Path]) -> None:
    folder = make_pope(1455)
    labels = folder / "coco" / "coco_pope_random.json"
    line = labels.read_text().splitlines()[0]
    labels.write_text(labels.read_text() + f"{line}\n" * 90)
    with pytest.raises(
        InputError, match=r"random.json has 3000 lines, .* 2910 random .*commit e3e39262 .*not from its latest"
    ):
        POPE.load(folder)


def test_a_label_file_of_another_length_is_refused(copied: Path) -> None:
    labels = copied / "coco" / "coco_pope_popular.json"
    labels.write_text("\n".join(labels.read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match=r"popular.json has 59 lines, .* 60 popular questions"):
        POPE.load(copied)


@pytest.mark.parametrize("field", ["text", "image"])
def test_a_label_about_another_question_is_refused_by_line(copied: Path, field: str) -> None:
    labels = copied / "coco" / "coco_pope_popular.json"
    lines = labels.read_text().splitlines()
    lines[6] = json.dumps(json.loads(lines[6]) | {field: "something else"})
    labels.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"popular.json line 7 is about .*question 20000007 asks"):
        POPE.load(copied)


def test_swapped_labels_are_refused(copied: Path) -> None:
    labels = copied / "coco" / "coco_pope_adversarial.json"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(InputError, match=r"adversarial.json line 1 is about"):
        score_answers(POPE, copied / "answers.jsonl", copied)


def test_the_pinned_commits_typo_is_the_only_difference_in_wording_that_passes(copied: Path) -> None:
    labels = copied / "coco" / "coco_pope_popular.json"
    labels.write_text(labels.read_text().replace("in the image", "in the imange"))
    assert score_answers(POPE, copied / "answers.jsonl", copied).headline == pytest.approx(60.6047778913)
    labels.write_text(labels.read_text().replace("in the imange", "in the picture"))
    with pytest.raises(InputError, match="is about"):
        POPE.load(copied)


def test_other_files_in_the_label_folder_are_left_alone(copied: Path) -> None:
    (copied / "coco" / ".DS_Store").write_bytes(b"\0")
    (copied / "coco" / "coco_pope_extra.json").write_text("{}")
    assert score_answers(POPE, copied / "answers.jsonl", copied).count == 176


def test_a_category_without_labels_is_named(copied: Path) -> None:
    (copied / "coco" / "coco_pope_random.json").unlink()
    with pytest.raises(InputError, match=r"no such file: .*coco_pope_random.json"):
        POPE.load(copied)


def test_questions_load_without_labels_but_do_not_score(copied: Path) -> None:
    shutil.rmtree(copied / "coco")
    assert len(POPE.load(copied)) == 176
    with pytest.raises(InputError, match=r"no such file: .*coco_pope_adversarial.json"):
        score_answers(POPE, copied / "answers.jsonl", copied)


def test_a_broken_record_costs_its_own_answer_only(copied: Path) -> None:
    file = copied / "llava_pope_test.jsonl"
    lines = file.read_text().splitlines()
    broken = json.loads(lines[2])
    del broken["text"]
    file.write_text("\n".join([*lines[:2], json.dumps(broken), *lines[3:]]))
    faults = [question.fault for question in POPE.load(copied) if question.fault]
    assert len(faults) == 1
    rows = [row for row in read_answers(copied / "answers.jsonl") if row["question_id"] != broken["question_id"]]
    write_jsonl(copied / "rest.jsonl", rows)
    partial = score_answers(POPE, copied / "rest.jsonl", copied, allow_partial=True)
    full = json.loads((copied / "expected.json").read_text())["main"]
    assert_equal_numbers(partial.scores["categories"]["popular"], full["categories"]["popular"])
    assert partial.scores["categories"]["adversarial"]["n"] == 59


def test_a_record_without_category_cannot_be_paired_with_labels(copied: Path) -> None:
    file = copied / "llava_pope_test.jsonl"
    file.write_text(file.read_text().replace('"category": "popular"', '"kind": "popular"'))
    with pytest.raises(InputError, match="question 20000001 names no category"):
        score_answers(POPE, copied / "answers.jsonl", copied)


def test_a_record_without_image_is_a_fault(copied: Path) -> None:
    file = copied / "llava_pope_test.jsonl"
    file.write_text(file.read_text().replace('"image"', '"picture"', 1))
    assert [question.id for question in POPE.load(copied) if question.fault == "the record has no image"] == [1]


def test_two_questions_of_one_id_are_refused(copied: Path) -> None:
    file = copied / "llava_pope_test.jsonl"
    file.write_text(file.read_text().replace('"question_id": 2,', '"question_id": 1,', 1))
    with pytest.raises(InputError, match="two different questions share the id 1"):
        score_answers(POPE, copied / "answers.jsonl", copied)


def test_the_published_command_prints_and_appends_the_published_lines(
    oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    results = tmp_path / "results" / "all.tsv"
    arguments = ["--annotation-dir", oracle / "coco", "--question-file", oracle / "llava_pope_test.jsonl"]
    arguments += ["--result-file", oracle / "answers.jsonl", "--path_to_all_results", results]
    monkeypatch.setattr("sys.argv", ["eval_pope", *map(str, arguments)])
    eval_pope.main()
    eval_pope.main()
    printed = capsys.readouterr().out
    assert printed.count("Category: adversarial, # samples: 60\nTP\tFP\tTN\tFN\t\n21\t17\t13\t9\nAccuracy: 0.5666") == 2
    assert "0.618, 0.567, 0.553, 0.700, 0.633\n====" in printed
    assert "avg of F1: 60.60\n" in printed
    assert results.read_text() == "POPE (Avg. F1)\t60.60\n" * 2


def test_an_unknown_benchmark_is_answered_with_the_closest() -> None:
    with pytest.raises(InputError, match=r"no benchmark 'pop'; known: .*did you mean 'pope'"):
        find_benchmark("pop")
