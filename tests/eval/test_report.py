import json
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import InputError
from llava.eval.report import escape_latex, format_latex, format_markdown, make_report, write_picture
from tests.eval.test_commands import run

LABELS = {"vqav2": "VQAv2 val (Acc)", "pope": "POPE (Avg. F1)", "mme": "MME (Perception)", "mmvet": "MM-Vet"}


def result(task: str, headline: float, kept: float | None = 16.0, **changes: object) -> dict:
    return {
        "task": task,
        "row": LABELS[task],
        "headline": headline,
        "columns": {"X": headline},
        "count": 10,
        "missing": 0,
        "model_id": "llava",
        "tokens": None if kept is None else {"mean_tokens": kept, "mean_patches": 64.0},
        **changes,
    }


def two_models() -> list[tuple[str, dict]]:
    return [
        ("plain", result("mme", 1400.0, 64.0)),
        ("plain", result("pope", 80.0, 64.0)),
        ("trim", result("mme", 1330.0, 10.0)),
        ("trim", result("pope", 78.0, 14.0)),
    ]


def test_an_overview_has_a_row_per_benchmark_in_the_order_of_the_benchmarks_and_an_average() -> None:
    (rows,) = make_report(two_models())["tables"].values()
    assert [row["Benchmark"] for row in rows] == ["POPE (Avg. F1)", "MME (Perception)", "Average"]
    assert rows[0] == {
        "Benchmark": "POPE (Avg. F1)",
        "plain": 80.0,
        "plain tok": 64.0,
        "trim": 78.0,
        "trim %": pytest.approx(97.5),
        "trim tok": 14.0,
    }
    assert rows[1]["trim %"] == pytest.approx(95.0)
    assert rows[2]["trim %"] == pytest.approx(96.25)
    assert rows[2]["trim tok"] == 12.0


def test_the_average_is_over_the_benchmarks_that_both_models_have() -> None:
    runs = [*two_models(), ("trim", result("vqav2", 70.0)), ("plain", result("mmvet", 30.0))]
    report = make_report(runs)
    assert report["average"]["trim"]["num_benchmarks"] == 2
    assert report["average"]["trim"]["retained_percent"] == pytest.approx(96.25)
    (rows,) = report["tables"].values()
    assert [(row["plain"], row["trim"], row["trim %"]) for row in rows[:1]] == [(None, 70.0, None)]
    assert "over the 2 benchmarks that both have" in " ".join(report["notes"])


def test_a_first_score_of_zero_or_below_gives_no_percentage() -> None:
    for headline in (0.0, -1.0):
        runs = [("a", result("pope", headline)), ("b", result("pope", 5.0))]
        report = make_report(runs, overview=True)
        assert report["benchmarks"][0]["runs"]["b"]["retained_percent"] is None
        assert report["average"]["b"]["retained_percent"] is None


def test_numbers_of_an_offline_judge_are_marked_and_never_compared_with_others() -> None:
    real = {"judge": "gpt-4-0613", "offline_judge": False}
    exact = {"judge": "exact", "offline_judge": True}
    runs = [("a", result("mmvet", 31.0, **real)), ("b", result("mmvet", 60.0, **exact)), ("b", result("pope", 80.0))]
    report = make_report(runs)
    (rows,) = report["tables"].values()
    labels = [row["Benchmark"] for row in rows]
    assert labels == ["POPE (Avg. F1)", "MM-Vet [judge: gpt-4-0613]", "MM-Vet [judge: exact]", "Average"]
    assert rows[2]["b %"] is None
    assert any(note.startswith("[judge: exact]: an offline stand-in") for note in report["notes"])
    assert r"MM-Vet [judge: exact]" in format_latex(report)
    assert report["benchmarks"][2]["runs"]["b"]["offline_judge"] is True


def test_scores_to_which_answers_are_missing_are_marked() -> None:
    runs = [("a", result("pope", 80.0)), ("b", result("pope", 70.0, missing=3)), ("a", result("mme", 1.0))]
    text = format_markdown(make_report(runs))
    assert "| POPE (Avg. F1) * |" in text
    assert "\n* POPE (Avg. F1): 3 answers of b are missing." in text


def test_two_results_of_one_benchmark_for_one_model_are_refused_in_an_overview() -> None:
    runs = [("a", result("pope", 80.0)), ("a", result("pope", 70.0)), ("a", result("mme", 1.0))]
    with pytest.raises(InputError, match=r"two results of POPE \(Avg. F1\) for a"):
        make_report(runs)
    assert len(make_report(runs, overview=False)["tables"]["POPE (Avg. F1)"]) == 2


def test_runs_of_one_benchmark_get_its_own_table_unless_told_otherwise() -> None:
    runs = [("a", result("pope", 80.0)), ("b", result("pope", 70.0))]
    assert format_markdown(make_report(runs)).startswith("POPE (Avg. F1)\n\n| Run |")
    assert format_markdown(make_report(runs, overview=True)).startswith("| Benchmark ")


def test_latex_has_the_same_cells_escaped() -> None:
    text = format_latex(make_report(two_models()))
    assert r"Benchmark & plain & plain tok & trim & trim \% & trim tok \\" in text
    assert r"POPE (Avg. F1) & 80.00 & 64.00 & 78.00 & 97.50 & 14.00 \\" in text
    assert text.count(r"\midrule") == 2
    assert r"\begin{tabular}{lrrrrr}" in text
    assert escape_latex("a_b & c^2 ~ 5%") == r"a\_b \& c\textasciicircum{}2 \textasciitilde{} 5\%"


def test_the_picture_grows_with_the_table(tmp_path: Path) -> None:
    write_picture(tmp_path / "deep" / "small.png", make_report(two_models()))
    runs = [(name, result(task, 50.0)) for name in ("a", "b", "c", "d_$x$") for task in LABELS]
    write_picture(tmp_path / "large.png", make_report(runs))
    small, large = Image.open(tmp_path / "deep" / "small.png"), Image.open(tmp_path / "large.png")
    assert large.width > small.width > 300
    assert large.height > small.height > 100


def test_the_command_writes_every_form(tmp_path: Path) -> None:
    arguments = []
    for number, (name, record) in enumerate(two_models()):
        file = tmp_path / f"{number}.json"
        file.write_text(json.dumps(record))
        arguments.append(f"{name}={file}")
    outputs = {kind: tmp_path / "out" / f"table.{kind}" for kind in ("json", "markdown", "latex", "png")}
    options = [word for kind, path in outputs.items() for word in (f"--{kind}", path)]
    done = run("report", *arguments, *options)
    assert done.returncode == 0, done.stderr
    assert "| POPE (Avg. F1)   |   80.00 |     64.00 |   78.00 |  97.50 |    14.00 |" in done.stdout
    assert outputs["markdown"].read_text() == done.stdout
    assert json.loads(outputs["json"].read_text())["benchmarks"][0]["runs"]["trim"]["mean_tokens"] == 14.0
    assert outputs["latex"].read_text().count(r"\\") == 4
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")
    assert run("report", *arguments, "--by-benchmark").stdout.count("| Run ") == 2
    failed = run("report", *arguments, "--png", "/dev/null/x.png")
    assert failed.stderr.startswith("error: cannot write /dev/null/x.png")


def test_the_command_needs_no_drawing_library_unless_it_draws() -> None:
    import subprocess
    import sys

    code = "import sys, llava.eval.__main__; sys.exit('matplotlib' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
