"""`python -m llava.eval compare`: what is run, what is kept, what the tables say."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llava.errors import InputError
from llava.eval.benchmark import Question, Verdict
from llava.eval.compare import NUM_SEEDS, RANDOM, Entry, plan_entries
from llava.eval.comparison import Against, Cell, average_rows, lay_out_budgets, write_tables
from llava.eval.comparison_page import (
    MAX_FAILURES,
    MAX_QUESTIONS,
    Failure,
    choose_questions,
    describe_look,
    list_failures,
)
from llava.eval.metrics.evidence import Interval, PairedDifference
from llava.looks import Look, Stage
from llava.model.image_tokens import ImageTokens
from llava.model.token_reduction import parse_reduction
from tests.eval.test_scripts import ENVIRONMENT, NO_GPU

METHODS = ["TRIM", "FasterVLM", "TRIM:-1", "VisionZip", "FastV,layer=1"]


def test_the_full_model_trim_pool_and_five_seeds_of_random_are_always_run():
    entries = plan_entries(["FasterVLM"], [16, 8], 64)
    assert entries[0].is_full
    specs = [entry.spec for entry in entries]
    assert {"TRIM:16", "TRIM:8", "Pool:16", "Pool:8", "FasterVLM:16", "FasterVLM:8"} < set(specs)
    for budget in (16, 8):
        seeds = [entry for entry in entries if entry.method == RANDOM and entry.budget == budget]
        assert len({entry.spec for entry in seeds}) == NUM_SEEDS >= 5


def test_a_setting_is_composed_as_the_method_says_and_a_spec_with_a_budget_stays():
    specs = [entry.spec for entry in plan_entries(["VisionZip", "TRIM:-1", "TRIM|FastV"], [64], 576)]
    assert "VisionZip:54" in specs and "TRIM:-1" in specs and "TRIM:64|FastV:0.5" in specs


def test_a_method_with_other_options_is_another_row():
    entries = plan_entries(["TRIM", "TRIM,position_ids=original", "Random,mean=true"], [64], 576)
    names = [entry.method for entry in entries]
    assert names.count("TRIM") == names.count("TRIM,position_ids=original") == names.count("Random,mean=true") == 1
    assert names.count(RANDOM) == NUM_SEEDS


def make_cell(task: str, method: str, budget: int | None, score: float, difference: float = 0.0) -> Cell:
    """A cell whose difference from TRIM and Random holds, unless it is 0."""
    interval = Interval(score - 1, score + 1)
    against = Against(PairedDifference(difference, interval, 0.0, 0, 0, 100.0), 0.001) if difference else None
    return Cell(
        *(task, task.upper(), method, budget, method, 10, float(budget or 36), score, interval, score, interval),
        *(0, 0, 100.0, against, against),
    )


def test_the_overview_has_a_table_per_budget_with_all_benchmarks_side_by_side():
    cells = [
        *(make_cell("a", "none", None, 80), make_cell("b", "none", None, 60)),
        *(make_cell("a", "TRIM", 9, 70), make_cell("b", "TRIM", 9, 50)),
        *(make_cell("a", "FastV", 9, 75, 5), make_cell("b", "FastV", 9, 40, -10)),
        *(make_cell("a", "TRIM:-1", None, 71), make_cell("b", "SCOPE", 9, 41)),
    ]
    tables = lay_out_budgets(sorted(cells, key=lambda cell: cell.task))
    assert list(tables) == ["@9", "Budgets of their own"]
    rows = {row["Method"]: row for row in tables["@9"]}
    assert (rows["FastV"]["A"], rows["FastV"]["B"], rows["FastV"]["% of full"]) == ("75.0+", "40.0-", 57.5)
    assert rows["FastV"]["+/- Random"] == "1/1 of 2"
    # A method that lacks a benchmark has no average.
    assert (rows["SCOPE"]["A"], rows["SCOPE"]["% of full"]) == (None, None)
    assert [row["Method"] for row in tables["Budgets of their own"]] == ["none", "TRIM:-1"]


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_the_terminals_tables_fit_it_and_the_files_have_every_column_in_one_table(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    methods = [
        ("none", None),
        ("TRIM", 9),
        ("HiPrune,object_layer=3,position_ids=original", 9),
        ("TRIM:-1|FastV:0.5", None),
    ]
    cells = [make_cell(task, method, budget, 70.25, 1.5) for task in ("a", "b") for method, budget in methods]
    text = write_tables(tmp_path, [], cells, {"TRIM": {"selection": 0.01, "answer": 0.2}})
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    assert text.count("69.2-71.2") == len(cells) * len(("Score", "% of full"))
    header = next(line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| Method"))
    assert header.count("|") == 12 and "to Random" in header and "Answer ms" in header


def test_budgets_that_are_matched_benchmark_by_benchmark_are_averaged_together():
    cells = [make_cell("a", "none", None, 80), make_cell("a", "TRIM", 9, 70)]
    cells += [make_cell("b", "none", None, 60), make_cell("b", "TRIM", 7, 50)]
    assert [row["Method"] for row in average_rows(cells)] == ["none", "TRIM matched"]
    assert [row["% of full"] for row in lay_out_budgets(cells)["matched"]] == [70, 60]


@pytest.mark.parametrize(
    ("methods", "budgets", "says"),
    [
        (["FasterVLM"], [577], "--budgets 577: an image has 576 patches; use 2 to 576"),
        (["FasterVLM"], [1], "--budgets 1: an image has 576 patches"),
        (["FasterVLMM"], [64], 'did you mean "FasterVLM"'),
        (["FasterVLM", "FasterVLM"], [64], "names the same method twice"),
    ],
)
def test_mistakes_end_in_one_line(methods: list[str], budgets: list[int], says: str):
    with pytest.raises(InputError, match=says):
        plan_entries(methods, budgets, 576)


NONE, TRIM, OTHER, THIRD, SMALL, OWN = (
    Entry(*fields)
    for fields in (
        ("none", None, "none"), ("TRIM", 8, "TRIM:8"), ("A", 8, "A:8"), ("B", 8, "B:8"), ("A", 4, "A:4"),
        ("C", None, "C:-1"),
    )
)  # fmt: skip


def judge(right: dict[Entry, str]) -> dict[Entry, dict[str, Verdict]]:
    """Verdicts of questions 0, 1, ...: 1 right, 0 wrong, - not answered."""
    return {
        entry: {
            str(number): Verdict(str(number), "", "", float(mark)) for number, mark in enumerate(marks) if mark != "-"
        }
        for entry, marks in right.items()
    }


def test_failures_come_by_how_many_other_methods_at_that_budget_have_them_right():
    verdicts = judge({NONE: "111101", TRIM: "000001", OTHER: "001101", THIRD: "011-11", SMALL: "111111", OWN: "101001"})
    # Question 4 is wrong in the full model too, and 5 is right; A at another budget does not count.
    assert list_failures(verdicts, TRIM) == [
        Failure("2", 3, 3), Failure("0", 1, 3), Failure("1", 1, 3), Failure("3", 1, 2)
    ]  # fmt: skip
    # A spec with a budget of its own is compared with all.
    assert list_failures(verdicts, OWN) == [Failure("1", 2, 4), Failure("3", 2, 3)]
    assert list_failures(verdicts, NONE) == []


def test_the_report_holds_the_questions_that_flip_most_and_each_methods_first_failures():
    number = MAX_QUESTIONS + 100
    # Two methods differ from the full model on the first questions, TRIM alone on 40 others, of which 12 are shown.
    first, late = "0" * MAX_QUESTIONS, "0" * 40
    verdicts = judge(
        {NONE: "1" * number, OTHER: first.ljust(number, "1"), THIRD: first.ljust(number, "1"), TRIM: "1" * 120 + late}
    )
    questions = {str(key): Question(id=key) for key in range(number)}
    failures = {entry: list_failures(verdicts, entry) for entry in verdicts}
    shown, left_out = choose_questions(questions, verdicts, list(verdicts), failures)
    expected = [*range(MAX_QUESTIONS), *range(120, 120 + MAX_FAILURES)]
    assert [each.question.id for each in shown] == expected and left_out == number - len(expected)


def test_the_report_draws_layers_centres_and_cells():
    kept = torch.tensor([True, True, False, False])
    stages = (Stage(0, 2, ~kept | kept, 0, 4), Stage(2, 6, kept, 0, 2))
    tokens = ImageTokens(torch.zeros(4, 2), 4)
    look = Look(parse_reduction("FastV"), tokens, torch.arange(4), stages)
    assert describe_look(look) == {"levels": "9933", "centres": [], "cells": None}
    centred = ImageTokens(torch.zeros(3, 2), 4, kept[None], centres=torch.tensor([[False, False, False, True]]))
    look = Look(parse_reduction("VisionZip"), centred, torch.tensor([0, 1, -1]), (Stage(0, 6, kept, 1, 3),))
    assert describe_look(look) == {"levels": "9909", "centres": [3], "cells": None}
    pooled = (Stage(0, 6, kept & ~kept, 2, 2),)
    look = Look(parse_reduction("Pool"), ImageTokens(torch.zeros(2, 2), 4), torch.tensor([-1, -1]), pooled, (1, 2))
    assert describe_look(look) == {"levels": "9999", "centres": [], "cells": (1, 2)}


def start(repository: Path, checkpoint: Path, root: Path, out: Path, *options: str) -> subprocess.Popen:
    command = ["compare", "--model-path", checkpoint, "--methods", *METHODS, "--budgets", "12", "7", "--tasks", "pope"]
    return subprocess.Popen(
        [sys.executable, "-m", "llava.eval", *map(str, command), "--out", str(out), *options],
        cwd=repository,
        env={**ENVIRONMENT, **NO_GPU, "LLAVA_EVAL_ROOT": str(root.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_gives_the_same_tables_twice(
    repository: Path, tmp_path: Path, make_pope: Callable[..., Path], tiny_checkpoint: Path
):
    pytest.importorskip("matplotlib")
    root, out = make_pope(4), tmp_path / "out"
    process = start(repository, tiny_checkpoint, root, out)
    while len(list(out.glob("runs/pope/*.scores.json"))) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    answered = {file.name: file.read_bytes() for file in out.glob("runs/pope/*.jsonl")}
    # A file that was torn is made anew.
    next(file for file in out.glob("features/**/*") if file.is_file()).write_bytes(b"torn")
    texts = []
    for _ in range(2):
        process = start(repository, tiny_checkpoint, root, out)
        text, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        names = ("table.md", "table.tex", "table.csv", "table.json", "report.html", "pareto.svg", "pareto.png")
        texts.append([text, *((out / name).read_bytes() for name in names)])
    assert texts[0] == texts[1]
    assert len(answered) >= 4
    assert all((out / "runs" / "pope" / name).read_bytes() == content for name, content in answered.items())
    check_tables(out, text)


def check_tables(out: Path, text: str) -> None:
    cells = json.loads((out / "table.json").read_text())["cells"]
    labels = [(cell["method"], cell["budget"]) for cell in cells]
    assert (
        len(labels) == len(set(labels)) == 1 + 5 * 2 + 1 + 2
    )  # full, methods and Pool at two budgets, TRIM:-1, Random
    assert labels[0] == ("none", None) and cells[0]["retained"] == 100
    for cell in cells[1:]:
        against = cell["against_reference"]
        assert (against is None) == (cell["method"] in ("TRIM", "TRIM:-1"))
        assert cell["interval"]["low"] <= cell["headline"] <= cell["interval"]["high"]
        if against is not None and cell["method"] not in ("Pool", "Random"):
            assert against["corrected_p"] >= against["difference"]["p_value"]
    fast = next(cell for cell in cells if cell["method"] == "FastV,layer=1")
    assert fast["mean_tokens"] == pytest.approx((36 + 2 * 12) / 3)
    assert "FasterVLM @12" in text
    page = (out / "report.html").read_text()
    data = json.loads(re.search(r"<script type=application/json id=data>(.*?)</script>", page, re.DOTALL)[1])
    question = data["pope"]["questions"][0]
    assert question["image"].startswith("data:image/jpeg;base64,")
    kept = [answer["left"]["levels"].count("9") for answer in question["answers"] if answer and answer["left"]]
    assert 12 in kept and 7 in kept
    for run in data["pope"]["runs"]:
        assert len(run["failures"]) == min(run["num_failures"], MAX_FAILURES)
        rights = [failure["right"] for failure in run["failures"]]
        assert rights == sorted(rights, reverse=True)
    assert not re.search(r"(src|href)=.?https?:", page)
