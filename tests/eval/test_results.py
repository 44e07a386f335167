import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import InputError
from llava.eval.benchmark import Verdict
from llava.eval.benchmarks import BENCHMARKS, find_benchmark
from llava.eval.judge import ExactJudge
from llava.eval.report import compare_runs, format_table
from llava.eval.results import (
    Result,
    TokenMeans,
    average_tokens,
    complete_verdicts,
    format_line,
    read_result,
    score_answers,
    write_line,
    write_result,
)
from tests.eval.test_promises import FOLDERS


def result(score: float, kept: float | None = None, **changes: object) -> Result:
    scored = Result(
        task="pope",
        row="POPE (Avg. F1)",
        headline=score,
        columns={"F1": score, "Accuracy": score + 1.0},
        count=10,
        model_id="llava",
        tokens=None if kept is None else TokenMeans(kept, 64.0),
    )
    return dataclasses.replace(scored, **changes)


def test_mean_tokens_count_questions_with_images_only() -> None:
    rows = [
        {"metadata": {"num_tokens": 10, "num_patches": 64}},
        {"metadata": {"num_tokens": 20, "num_patches": 128}},
        {"metadata": {"num_tokens": 0, "num_patches": 0}},
        {"metadata": {}},
        {"metadata": "of another tool"},
        {"metadata": {"num_tokens": "10", "num_patches": None}},
        {},
    ]
    assert average_tokens(rows) == TokenMeans(mean_tokens=15.0, mean_patches=96.0)
    assert average_tokens(rows[2:]) is None


def test_the_interval_of_the_mean_draws_images_with_all_of_their_questions() -> None:
    counts = [10, 12, 11, 30, 29, 31, 15, 15, 16, 20, 21, 19]
    rows = [{"metadata": {"num_tokens": count, "num_patches": 64}} for count in counts]
    apart = average_tokens(rows, [f"{number}.jpg" for number in range(12)])
    together = average_tokens(rows, [f"{number // 3}.jpg" for number in range(12)])
    for means in (apart, together):
        assert means.interval[0] < means.mean_tokens < means.interval[1]
    assert together.interval[1] - together.interval[0] > apart.interval[1] - apart.interval[0]
    assert TokenMeans.from_json(json.loads(json.dumps(apart.to_json()))) == apart


def test_a_number_that_is_the_same_for_all_has_no_interval() -> None:
    rows = [{"metadata": {"num_tokens": 10, "num_patches": 64}}] * 5
    assert average_tokens(rows, list("abcde")) == TokenMeans(10.0, 64.0)


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


TEXT = "TextVQA (Acc)"


def test_lines_are_appended_in_a_folder_that_is_made(tmp_path: Path) -> None:
    file = tmp_path / "results" / "all.tsv"
    assert write_line(file, result(60.6)) == "POPE (Avg. F1)\t60.60"
    write_line(file, result(58.2, row=TEXT))
    assert file.read_text() == "POPE (Avg. F1)\t60.60\nTextVQA (Acc)\t58.20\n"


def test_a_score_takes_the_place_of_its_line_and_others_stay_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "all.tsv"
    before, after = b"# by hand\r\n\nGQA\t61.97\r\n", b"caf\xe9\t1\n\n  MME\t1500.00  \n"
    file.write_bytes(before + b"POPE (Avg. F1)\t12.00\n" + after)
    for headline in (60.6, 60.6, 61.0):
        write_line(file, result(headline))
        assert file.read_bytes() == before + f"POPE (Avg. F1)\t{headline:.2f}\n".encode() + after


@pytest.mark.parametrize(
    ("torn", "whole"),
    [
        (b"GQA\t61.9", b"GQA\t61.9\nPOPE (Avg. F1)\t60.60\n"),
        (b"MME\t1\nGQ", b"MME\t1\nGQ\nPOPE (Avg. F1)\t60.60\n"),
        (b"MME\t1\nPOPE (Av", b"MME\t1\nPOPE (Avg. F1)\t60.60\n"),
        (b"POPE (Avg. F1)\t60.", b"POPE (Avg. F1)\t60.60\n"),
        (b"POPE (Avg. F1)\t60.60", b"POPE (Avg. F1)\t60.60\n"),
        (b"POPE (Avg. F1)\t77.", b"POPE (Avg. F1)\t60.60\n"),
        (b"\xff\xfe", b"\xff\xfe\nPOPE (Avg. F1)\t60.60\n"),
    ],
)
def test_a_torn_line_is_ended_or_replaced_never_glued_to(tmp_path: Path, torn: bytes, whole: bytes) -> None:
    file = tmp_path / "all.tsv"
    file.write_bytes(torn)
    write_line(file, result(60.6))
    assert file.read_bytes() == whole


def test_a_complete_score_takes_the_place_of_one_with_answers_missing(tmp_path: Path) -> None:
    file = tmp_path / "all.tsv"
    for missing in (7, 3, 0):
        write_line(file, result(60.0, missing=missing))
    assert file.read_text() == "POPE (Avg. F1)\t60.00\n"


def test_two_runs_in_one_file_keep_a_line_each(tmp_path: Path) -> None:
    file = tmp_path / "all.tsv"

    def write(name: str, headline: float, **changes: object) -> None:
        write_line(file, result(headline, answers=str(tmp_path / name), **changes))

    for headline in (60.0, 60.0, 61.0):
        write("plain.jsonl", headline)
        write("trim.jsonl", 60.0)
        write("plain.jsonl", 33.0, row="MM-Vet", judge="exact", offline_judge=True)
        write("plain.jsonl", 44.0, row="MM-Vet", judge="gpt-4-0613")
    assert file.read_text().splitlines() == [
        "POPE (Avg. F1)\t61.00", "POPE (Avg. F1)\t60.00", "MM-Vet [judge: exact]\t33.00", "MM-Vet\t44.00",
    ]  # fmt: skip
    write("trim.jsonl", 62.0)
    write("plain.jsonl", 62.0)
    write("plain.jsonl", 63.0)
    assert file.read_text().splitlines()[:2] == ["POPE (Avg. F1)\t63.00", "POPE (Avg. F1)\t62.00"]


@pytest.mark.parametrize("owners", ["{", "[]", '{"x": 1}', '{"x": [1]}'])
def test_a_broken_note_of_who_wrote_what_costs_nothing(tmp_path: Path, owners: str) -> None:
    file = tmp_path / "all.tsv"
    write_line(file, result(60.0))
    (tmp_path / ".all.tsv.runs.json").write_text(owners)
    write_line(file, result(61.0))
    assert file.read_text() == "POPE (Avg. F1)\t61.00\n"


WRITE_LINES = """
import sys
from pathlib import Path
from llava.eval.results import Result, write_line
for number in range(10):
    for headline in (1.0, 2.0):
        write_line(Path(sys.argv[1]), Result("x", f"{sys.argv[2]} {number}", headline))
"""


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    file = tmp_path / "all.tsv"
    commands = [[sys.executable, "-c", WRITE_LINES, str(file), name] for name in "abcd"]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(100) for process in processes] == [0] * 4
    lines = file.read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {number}\t2.00" for name in "abcd" for number in range(10))


def test_a_link_to_a_results_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "all.tsv")
    write_line(tmp_path / "link", result(60.0))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "all.tsv").read_text() == "POPE (Avg. F1)\t60.00\n"


def test_a_result_without_a_score_is_read_back_and_needs_a_reason(tmp_path: Path) -> None:
    written = result(0.0, 3.0, headline=None, unscored="no judge")
    write_result(tmp_path / "scores.json", written)
    assert read_result(tmp_path / "scores.json") == written
    (tmp_path / "scores.json").write_text(json.dumps({**written.to_json(), "unscored": None}))
    with pytest.raises(InputError, match='"headline" must be a number'):
        read_result(tmp_path / "scores.json")


TOOLS = {
    "question_id and text alone": lambda row, key: {name: row[name] for name in ("question_id", "text")},
    "key and text alone": lambda row, key: {name: row[name] for name in ("question_id", "text", *key) if name in row},
    "no model_id": lambda row, key: {name: value for name, value in row.items() if name != "model_id"},
    "odd metadata": lambda row, key: {**row, "metadata": "none", "model_id": 5},
    "ids of the other type": lambda row, key: {**row, "question_id": change_type(row["question_id"])},
}
"""What other tools write."""


def change_type(identity: int | str) -> int | str:
    return str(identity) if isinstance(identity, int) else int(identity) if identity.isdecimal() else identity


@pytest.mark.parametrize("tool", list(TOOLS))
@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_answers_of_other_tools_are_scored_alike_or_refused(name: str, tool: str, golden: Path, tmp_path: Path) -> None:
    task, root = find_benchmark(name), golden / "oracle" / FOLDERS.get(name, name)
    judge = None if task.uses_judge == "never" else ExactJudge(task)
    rows = [json.loads(line) for line in (root / "answers.jsonl").read_text().splitlines()]
    changed = tmp_path / "answers.jsonl"
    changed.write_text("".join(json.dumps(TOOLS[tool](row, task.key_fields)) + "\n" for row in rows))
    if tool == "question_id and text alone" and name in ("textvqa", "mme"):
        with pytest.raises(InputError, match=r"an answer may belong to any of \d questions, it has no prompt"):
            score_answers(task, changed, root, allow_partial=True, judge=judge)
        return
    expected = score_answers(task, root / "answers.jsonl", root, allow_partial=True, judge=judge)
    found = score_answers(task, changed, root, allow_partial=True, judge=judge)
    assert (found.headline, found.scores, found.missing) == (expected.headline, expected.scores, expected.missing)


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
    assert row["Run"] == "plain (3 answers missing, protocol unknown)"


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
    [
        (None, "no such file"),
        ("{", "is not JSON"),
        ("[]", "is not a result"),
        ("{}", "is not a result"),
        ({"headline": "60"}, '"headline" must be a number'),
        ({"headline": None}, '"headline" must be a number'),
        ({"columns": []}, '"columns" must be an object'),
        ({"missing": True}, '"missing" must be a whole number'),
        ({"tokens": [1, 2]}, "tokens or verdicts"),
        ({"verdicts": [{"key": "1"}]}, "tokens or verdicts"),
        ({"schema": 3}, "has schema 3, this version reads 2"),
    ],
)
def test_files_that_are_no_results_are_refused(tmp_path: Path, content: str | dict | None, words: str) -> None:
    file = tmp_path / "scores.json"
    if isinstance(content, dict):
        content = json.dumps({**result(60.0).to_json(), **content})
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=words):
        read_result(file)


def test_a_result_is_read_back_as_written(tmp_path: Path) -> None:
    verdicts = (
        Verdict("[1]", "Yes", "no", 0.0, parsed="yes", category="random", image="a b.jpg", query="?", num_tokens=3),
        Verdict("[2]", "two\nlines", ("a", "b"), 0.6),
        Verdict("g", "A | B", "A", 1.0, unit="group", details={"question_keys": ["[1]", "[2]"]}),
    )
    written = result(60.0, 3.0, verdicts=verdicts, scores={"F1": 60.0})
    write_result(tmp_path / "scores.json", written)
    assert read_result(tmp_path / "scores.json") == written
    lines = (tmp_path / "scores.json").read_text().splitlines()
    assert [json.loads(line.strip(" ,"))["correct"] for line in lines if '"key"' in line] == [False, True, True]
    data = json.loads((tmp_path / "scores.json").read_text())
    assert data["schema"] == 2
    assert data["verdicts"][1] == {
        "key": "[2]",
        "prediction": "two\nlines",
        "reference": ["a", "b"],
        "points": 0.6,
        "unit": "question",
        "correct": True,
    }


def test_a_file_of_the_version_before_verdicts_is_read(tmp_path: Path) -> None:
    data = {
        "task": "pope",
        "row": "POPE (Avg. F1)",
        "headline": 60.0,
        "scores": {"average_f1": 60.0},
        "count": 10,
        "columns": {"F1": 60.0},
        "missing": 0,
        "judge": None,
        "offline_judge": False,
        "headline_judged": False,
        "model_id": "llava",
        "tokens": {"mean_tokens": 3.0, "mean_patches": 64.0},
        "answers": "answers.jsonl",
    }
    (tmp_path / "scores.json").write_text(json.dumps(data))
    old = read_result(tmp_path / "scores.json")
    assert (old.tokens, old.verdicts) == (TokenMeans(3.0, 64.0), ())
    assert {**old.to_json(), "verdicts": [], "schema": 2} == {**data, "verdicts": [], "schema": 2}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_the_headline_follows_from_the_verdicts_of_the_file(name: str, golden: Path, tmp_path: Path) -> None:
    task, root = find_benchmark(name), golden / "oracle" / FOLDERS.get(name, name)
    judge = None if task.uses_judge == "never" else ExactJudge(task)
    write_result(
        tmp_path / "scores.json", score_answers(task, root / "answers.jsonl", root, allow_partial=True, judge=judge)
    )
    read = read_result(tmp_path / "scores.json")
    assert read.verdicts
    assert task.headline(read.verdicts) == pytest.approx(read.headline, abs=1e-9)
    assert all(0 <= verdict.points <= 1 for verdict in read.verdicts)
    # ScienceQA asks some questions of text alone; every other verdict, of a group or pair too, leads to its image.
    assert all(verdict.query for verdict in read.verdicts)
    assert name == "sqa" or all(verdict.image for verdict in read.verdicts)


def test_verdicts_name_image_query_and_tokens(oracle: Path, tmp_path: Path) -> None:
    scored = score_answers(find_benchmark("pope"), oracle / "answers.jsonl", oracle)
    rows = [json.loads(line) for line in (oracle / "answers.jsonl").read_text().splitlines()]
    by_key = {verdict.key: verdict for verdict in scored.verdicts}
    assert len(scored.verdicts) == scored.count == len(rows) == 176
    for row in rows[::40]:
        verdict = by_key[json.dumps([row["question_id"]])]
        assert verdict.prediction == row["text"]
        assert verdict.image.startswith("val2014/COCO_val2014_")
        assert verdict.query == row["prompt"]
        assert verdict.num_tokens == row.get("metadata", {}).get("num_tokens")


def test_a_group_is_about_its_first_question_and_a_name_without_one_about_none(oracle: Path) -> None:
    questions = {"[1]": find_benchmark("pope").load(oracle)[0]}
    verdicts = [
        Verdict("g", "A | B", "A", 1.0, unit="group", details={"question_keys": ["[1]", "[2]"]}),
        Verdict("h", "A | B", "A", 1.0, unit="pair"),
    ]
    answers = {"[1]": {"metadata": {"num_tokens": 7, "num_patches": 64}}}
    first, second = complete_verdicts(verdicts, questions, answers, oracle)
    assert (first.query, first.num_tokens) == (questions["[1]"].query, 7)
    assert first.image == questions["[1]"].images[0].relative_to(oracle).as_posix()
    assert second == verdicts[1]
