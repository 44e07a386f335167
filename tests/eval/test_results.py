import json
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.results import append_line, average_tokens, compare_runs, format_line, format_table, read_result


def result(headline: float, kept: float | None = None, **changes: object) -> dict:
    return {
        "task": "pope",
        "row": "POPE (Avg. F1)",
        "headline": headline,
        "columns": {"F1": headline, "Accuracy": headline + 1.0},
        "count": 10,
        "missing": 0,
        "model_id": "llava",
        "tokens": None if kept is None else {"mean_tokens": kept, "mean_patches": 64.0},
        **changes,
    }


def test_mean_tokens_count_questions_with_images_only() -> None:
    rows = [
        {"metadata": {"num_tokens": 10, "num_patches": 64}},
        {"metadata": {"num_tokens": 20, "num_patches": 128}},
        {"metadata": {"num_tokens": 0, "num_patches": 0}},
        {"metadata": {}},
        {},
    ]
    assert average_tokens(rows) == {"mean_tokens": 15.0, "mean_patches": 96.0}
    assert average_tokens(rows[2:]) is None


def test_a_line_has_a_tab_and_two_digits() -> None:
    assert format_line(result(60.6049)) == "POPE (Avg. F1)\t60.60"


def test_the_line_of_an_offline_judge_says_so_and_that_of_a_real_one_is_the_published_one() -> None:
    offline = {"row": "MM-Vet", "judge": "exact (offline stand-in)", "offline_judge": True}
    assert format_line(result(42.7, **offline)) == "MM-Vet [judge: exact]\t42.70"
    assert format_line(result(42.7, missing=3, **offline)) == "MM-Vet [judge: exact] [3 answers missing]\t42.70"
    assert format_line(result(42.7, row="MM-Vet", judge="gpt-4-0613", offline_judge=False)) == "MM-Vet\t42.70"


def test_a_headline_that_needs_no_judge_is_not_marked_but_the_table_with_the_judges_column_is() -> None:
    judged = result(42.7, row="MMBench", judge="exact", offline_judge=True, headline_judged=False)
    assert format_line(judged) == "MMBench\t42.70"
    assert list(compare_runs([("plain", judged)])) == ["MMBench [judge: exact]"]


def test_runs_of_different_judges_are_not_compared() -> None:
    runs = [("a", result(30.0, row="MM-Vet", judge=judge, offline_judge=False)) for judge in ("gpt-4", "gpt-5")]
    tables = compare_runs(runs)
    assert list(tables) == ["MM-Vet [judge: gpt-4]", "MM-Vet [judge: gpt-5]"]
    assert all(len(rows) == 1 for rows in tables.values())


def test_lines_are_appended_in_a_folder_that_is_made(tmp_path: Path) -> None:
    file = tmp_path / "results" / "all.tsv"
    append_line(file, "POPE (Avg. F1)\t60.60")
    append_line(file, "TextVQA (Acc)\t58.20")
    assert file.read_text() == "POPE (Avg. F1)\t60.60\nTextVQA (Acc)\t58.20\n"


def test_runs_are_compared_with_the_first_of_their_benchmark() -> None:
    runs = [("plain", result(80.0, 64.0)), ("trim", result(76.0, 16.0)), ("other", result(40.0, None, row="MME"))]
    tables = compare_runs(runs)
    assert list(tables) == ["POPE (Avg. F1)", "MME"]
    plain, trim = tables["POPE (Avg. F1)"]
    assert (plain["% of first"], plain["Tokens"]) == (100.0, 64.0)
    assert (trim["F1"], trim["Accuracy"], trim["Tokens"], trim["% of tokens"]) == (76.0, 77.0, 16.0, 25.0)
    assert trim["% of first"] == pytest.approx(95.0)
    assert tables["MME"][0]["% of first"] == 100.0
    assert tables["MME"][0]["Tokens"] is None


def test_a_run_without_all_answers_is_marked_in_the_table() -> None:
    (row,) = compare_runs([("plain", result(80.0, missing=3))])["POPE (Avg. F1)"]
    assert row["Run"] == "plain (3 answers missing)"


def test_a_first_run_of_zero_gives_no_percentage() -> None:
    rows = compare_runs([("a", result(0.0)), ("b", result(5.0))])["POPE (Avg. F1)"]
    assert [row["% of first"] for row in rows] == [None, None]


def test_tables_are_aligned_markdown() -> None:
    rows = [{"Run": "plain", "F1": 80.0, "Tokens": 64.0}, {"Run": "TRIM:-1", "F1": 7.125, "Tokens": None}]
    assert format_table(rows).splitlines() == [
        "| Run     |    F1 | Tokens |",
        "| ------- | ----: | -----: |",
        "| plain   | 80.00 |  64.00 |",
        "| TRIM:-1 |  7.12 |      - |",
    ]
    assert format_table([]) == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), ("{", "is not JSON"), ("[]", "is not a result"), ("{}", "is not a result")],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "scores.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=words):
        read_result(file)


def test_a_result_is_read_back_as_written(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps(result(60.0, 3.0)))
    assert read_result(file) == result(60.0, 3.0)
