import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from llava.errors import InputError
from llava.eval.protocol import ProtocolRecord
from llava.eval.report import (
    escape_latex,
    format_latex,
    format_markdown,
    format_terminal,
    make_report,
    plan_plot,
    write_plot,
)
from llava.eval.results import Result, TokenMeans, write_result
from tests.eval.test_commands import run

LABELS = {"vqav2": "VQAv2 val (Acc)", "pope": "POPE (Avg. F1)", "mme": "MME (Perception)", "mmvet": "MM-Vet"}


def result(task: str, headline: float, kept: float | None = 16.0, **changes: object) -> Result:
    scored = Result(
        task=task,
        row=LABELS[task],
        headline=headline,
        columns={"X": headline},
        count=10,
        model_id="llava",
        tokens=None if kept is None else TokenMeans(kept, 64.0),
        protocol=ProtocolRecord(task),
    )
    return dataclasses.replace(scored, **changes)


def two_models() -> list[tuple[str, Result]]:
    return [
        ("plain", result("mme", 1400.0, 64.0)),
        ("plain", result("pope", 80.0, 64.0)),
        ("trim", result("mme", 1330.0, 10.0)),
        ("trim", result("pope", 78.0, 14.0)),
    ]


def test_an_overview_has_a_row_per_benchmark_in_the_order_of_the_benchmarks_and_an_average() -> None:
    (rows,) = make_report(two_models()).tables.values()
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
    assert report.average["trim"].num_benchmarks == 2
    assert report.average["trim"].retained_percent == pytest.approx(96.25)
    (rows,) = report.tables.values()
    assert [(row["plain"], row["trim"], row["trim %"]) for row in rows[:1]] == [(None, 70.0, None)]
    assert "over the 2 benchmarks that both have" in " ".join(report.notes)


def test_a_first_score_of_zero_or_below_gives_no_percentage() -> None:
    for headline in (0.0, -1.0):
        runs = [("a", result("pope", headline)), ("b", result("pope", 5.0))]
        report = make_report(runs, overview=True)
        assert report.benchmarks[0].runs["b"].retained_percent is None
        assert report.average["b"].retained_percent is None


def test_numbers_of_an_offline_judge_are_marked_and_never_compared_with_others() -> None:
    real = {"judge": "gpt-4-0613", "offline_judge": False}
    exact = {"judge": "exact", "offline_judge": True}
    runs = [("a", result("mmvet", 31.0, **real)), ("b", result("mmvet", 60.0, **exact)), ("b", result("pope", 80.0))]
    report = make_report(runs)
    (rows,) = report.tables.values()
    labels = [row["Benchmark"] for row in rows]
    assert labels == ["POPE (Avg. F1)", "MM-Vet [judge: gpt-4-0613]", "MM-Vet [judge: exact]", "Average"]
    assert rows[2]["b %"] is None
    assert any(note.startswith("[judge: exact]: an offline stand-in") for note in report.notes)
    assert r"MM-Vet [judge: exact]" in format_latex(report)
    assert report.benchmarks[2].runs["b"].offline_judge is True


def test_scores_to_which_answers_are_missing_are_marked() -> None:
    runs = [("a", result("pope", 80.0)), ("b", result("pope", 70.0, missing=3)), ("a", result("mme", 1.0))]
    text = format_markdown(make_report(runs))
    assert "| POPE (Avg. F1) * |" in text
    assert "\n* POPE (Avg. F1): 3 answers of b are missing." in text


def test_two_results_of_one_benchmark_for_one_model_are_refused_in_an_overview() -> None:
    runs = [("a", result("pope", 80.0)), ("a", result("pope", 70.0)), ("a", result("mme", 1.0))]
    with pytest.raises(InputError, match=r"two results of POPE \(Avg. F1\) for a"):
        make_report(runs)
    assert len(make_report(runs, overview=False).tables["POPE (Avg. F1)"]) == 2


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


def test_names_stay_one_cell_whatever_is_in_them() -> None:
    odd = "a|b\nc \x1b[31m_$x$"
    runs = [(odd, result("pope", 80.0)), ("b", result("pope", 70.0, row="[x] ")), (odd, result("mme", 1.0, row="*\n%"))]
    for overview in (True, False):
        report = make_report(runs, overview)
        for text in (format_markdown(report), format_terminal(report)):
            lines = [line for line in text.splitlines() if line.startswith("|")]
            counts = [line.replace("\\|", "").count("|") for line in lines]
            assert not overview or len(set(counts)) == 1
            assert "a\\|b" in text
            assert "\x1b" not in text
        latex = format_latex(report)
        assert r"a\textbar{}b c [31m\_\$x\$" in latex
        commands = ("\\", "{}", "%", "POPE", "Benchmark", "Run", "Average", "a\\textbar", "b ")
        assert all(line.startswith(commands) for line in latex.splitlines() if line)
    assert escape_latex("a -- b --- <|>") == r"a -{}- b -{}-{}- \textless{}\textbar{}\textgreater{}"
    assert "\n{}* \\% & " in format_latex(make_report(runs))
    assert "\n{}[x]" in format_latex(make_report(runs))


def test_the_terminal_shows_score_and_percentage_in_one_column_and_tokens_once() -> None:
    lines = format_terminal(make_report(two_models())).splitlines()
    assert lines[:6] == [
        "| Benchmark        |   plain |           trim |",
        "| ---------------- | ------: | -------------: |",
        "| POPE (Avg. F1)   |   80.00 |   78.00  97.5% |",
        "| MME (Perception) | 1400.00 | 1330.00  95.0% |",
        "| Average          |       - |          96.2% |",
        "| Tokens, mean     |   64.00 |          12.00 |",
    ]


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_the_terminals_tables_fit_its_width_and_lose_no_cell(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    names = ("no reduction", "TRIM:-1, training-free", "TRIM:-1, finetuned", "Random, same budget", "Random, free")
    runs = [(name, result(task, 1500.0)) for name in names for task in LABELS]
    runs += [
        (name, result("mmvet", 77.0, row="LLaVA-Bench (Wild)", judge="exact", offline_judge=True)) for name in names
    ]
    split = {f"{kind}, {part}": 1234.5 for kind in ("random", "popular", "adversarial") for part in ("acc", "F1")}
    runs_of_one = [(name, result("pope", 80.0, columns=split, missing=3)) for name in names]
    for report in (make_report(runs), make_report(runs_of_one)):
        text = format_terminal(report)
        assert max(map(len, text.splitlines())) <= min(columns, 100)
        assert text.count("1500.00") + text.count("1234.50") == 20 + 10 * (not report.models)
        assert all(word in text for name in names for word in name.split())


def test_the_plot_grows_with_the_number_of_bars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_plot(tmp_path / "deep" / "small.png", make_report(two_models()))
    runs = [(name, result(task, 50.0)) for name in ("a", "b", "c", "d_$x$") for task in LABELS]
    write_plot(tmp_path / "large.png", make_report(runs))
    small, large = Image.open(tmp_path / "deep" / "small.png"), Image.open(tmp_path / "large.png")
    assert large.width == small.width > 300
    assert large.height > small.height > 100


def test_the_plot_shows_what_each_model_retains() -> None:
    (panel,) = plan_plot(make_report(two_models()))
    assert panel.reference == (100.0, "plain (64.0 tokens)")
    assert panel.series == ["trim (12.0 tokens)"]
    assert panel.title == "trim retains 96.2 % of plain's score, with 12.0 of 64.0 visual tokens"
    values = {label: value for label, (value,) in panel.groups}
    assert values == {
        "POPE (Avg. F1)": pytest.approx(97.5),
        "MME (Perception)": pytest.approx(95.0),
        "Average": pytest.approx(96.25),
    }


def test_the_plot_shows_scores_where_there_is_nothing_to_compare() -> None:
    (alone,) = plan_plot(make_report(two_models()[:2]))
    assert alone.groups == [("POPE (Avg. F1)", [80.0]), ("MME (Perception)", [1400.0])]
    (pope,) = plan_plot(make_report([("a", result("pope", 80.0)), ("b", result("pope", 0.0, None))]))
    assert (pope.title, pope.unit, pope.groups) == ("POPE (Avg. F1)", "X", [("a\n16.0 tokens", [80.0]), ("b", [0.0])])


@pytest.mark.parametrize("headlines", [(0.0, 0.0), (-1.0, 5.0), (1400.0, 60.0)])
def test_any_scores_can_be_drawn(tmp_path: Path, headlines: tuple[float, float]) -> None:
    pytest.importorskip("matplotlib")
    runs = [("a", result("mme", headlines[0])), ("b", result("pope", headlines[1], None))]
    for number, chosen in enumerate((runs, runs[:1])):
        for overview in (True, False):
            path = tmp_path / f"{number}{overview}.png"
            write_plot(path, make_report(chosen, overview))
            assert Image.open(path).width > 300


def test_the_command_writes_every_form(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = []
    for number, (name, record) in enumerate(two_models()):
        file = tmp_path / f"{number}.json"
        write_result(file, record)
        arguments.append(f"{name}={file}")
    outputs = {kind: tmp_path / "out" / f"table.{kind}" for kind in ("json", "markdown", "latex", "png")}
    options = [word for kind, path in outputs.items() for word in (f"--{kind}", path)]
    done = run("report", *arguments, *options)
    assert done.returncode == 0, done.stderr
    assert "| POPE (Avg. F1)   |   80.00 |   78.00  97.5% |" in done.stdout
    markdown = outputs["markdown"].read_text()
    assert "| POPE (Avg. F1)   |   80.00 |     64.00 |   78.00 |  97.50 |    14.00 |" in markdown
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


def unscored(task: str, kept: float) -> Result:
    return dataclasses.replace(result(task, 0.0, kept), headline=None, columns={}, unscored="no judge")


@pytest.mark.parametrize("missing", ["plain", "trim", "both"])
def test_a_benchmark_without_a_score_keeps_its_row(tmp_path: Path, missing: str) -> None:
    pytest.importorskip("matplotlib")
    runs = two_models()
    for model, kept in (("plain", 64.0), ("trim", 12.0)):
        runs.append((model, unscored("mmvet", kept) if missing in (model, "both") else result("mmvet", 30.0, kept)))
    report = make_report(runs)
    (rows,) = report.tables.values()
    assert [row["Benchmark"] for row in rows] == ["POPE (Avg. F1)", "MME (Perception)", "MM-Vet", "Average"]
    assert rows[2]["plain"] == ("no judge" if missing in ("plain", "both") else 30.0)
    assert rows[2]["trim"] == ("no judge" if missing in ("trim", "both") else 30.0)
    assert rows[2]["trim %"] is None
    assert (rows[2]["trim tok"], rows[3]["trim tok"]) == (12.0, 12.0)
    assert rows[3]["trim %"] == pytest.approx(96.25)
    for text in (format_terminal(report), format_markdown(report), format_latex(report)):
        assert "no judge" in text
    write_plot(tmp_path / "plot.png", report)
    assert json.loads(json.dumps(report.to_json()))["benchmarks"][2]["runs"]["trim"]["mean_tokens"] == 12.0


def test_runs_without_a_score_are_put_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [("plain", unscored("mmvet", 64.0)), ("trim", unscored("mmvet", 12.0))]
    report = make_report(runs)
    (rows,) = report.tables.values()
    assert rows[1] == {"Run": "trim", "Score": "no judge", "Tokens": 12.0, "% of tokens": 18.75, "% of first": None}
    write_plot(tmp_path / "plot.png", report)
    write_plot(tmp_path / "plot.png", make_report(runs[:1], overview=True))
