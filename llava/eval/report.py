"""Tables of results: runs of one benchmark side by side, or all benchmarks with a column per model.

The same rows are written as Markdown, LaTeX (booktabs) and a picture. The overview compares each model with the first
one: its score as a percentage of the first one's, per benchmark and on average, and the visual tokens it read.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import InputError
from llava.eval.answers import explain_write_errors
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.results import Result, compare_runs, format_cell, format_table, label_result, mark_judge

AVERAGE_LABEL = "Average"
MARK = "*"
"""Beside the label of a row that has a note of its own."""

LATEX_ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
INCHES_PER_CHARACTER = 0.085
INCHES_PER_ROW = 0.27
PICTURE_DPI = 160

Run = tuple[str, Result]
"""Name of a model, and what it scored on one benchmark."""


def make_report(runs: Sequence[Run], overview: bool | None = None) -> dict[str, Any]:
    """Put runs together.

    Args:
        runs: (model, result), in the order of the columns.
        overview: a row per benchmark; False: a table per benchmark with a row per run; None: whichever fits.

    Returns:
        JSON data: `tables` (rows by title), `notes` (lines that belong below), and for an overview its unrounded
        numbers as `benchmarks` and `average`.

    Raises:
        InputError: a model has two results of one benchmark, so that an overview has no one number for it.
    """
    if overview is None:
        overview = len({result["task"] for _, result in runs}) > 1
    if not overview:
        return {"tables": compare_runs(runs), "notes": []}
    benchmarks = group_by_benchmark(runs)
    models = list(dict.fromkeys(name for name, _ in runs))
    average = {model: average_model(benchmarks, model) for model in models}
    return {
        "tables": {"": tabulate(benchmarks, models, average)},
        "notes": [*explain_partial(benchmarks), *explain_columns(benchmarks, models, average)],
        "models": models,
        "benchmarks": benchmarks,
        "average": average,
    }


def group_by_benchmark(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """List each benchmark with what every model scored on it.

    Results that different judges gave are different benchmarks here: they do not compare.

    Returns:
        In the order of `BENCHMARKS`: `label`, `task` and `runs`: for each model `headline`, `retained_percent`
        (of the first model's headline; None where that is unknown or not positive), `mean_tokens`, `mean_patches`,
        `count`, `missing`, `judge`, `offline_judge`.
    """
    runs = list(runs)
    reference = runs[0][0] if runs else None
    groups: dict[str, dict[str, Any]] = {}
    for model, result in runs:
        label = label_result(result)
        group = groups.setdefault(label, {"label": label, "task": result["task"], "runs": {}})
        if model in group["runs"]:
            raise InputError(f"two results of {label} for {model}; give each run its own NAME=FILE.json")
        tokens = result.get("tokens") or {}
        group["runs"][model] = {
            "headline": result["headline"],
            "retained_percent": None,
            "mean_tokens": tokens.get("mean_tokens"),
            "mean_patches": tokens.get("mean_patches"),
            "count": result.get("count"),
            "missing": result["missing"],
            "judge": result.get("judge"),
            "offline_judge": bool(mark_judge(result)),
        }
    for group in groups.values():
        first = group["runs"].get(reference, {}).get("headline")
        for run in group["runs"].values():
            run["retained_percent"] = 100 * run["headline"] / first if first and first > 0 else None
    order = list(BENCHMARKS)
    return sorted(
        groups.values(), key=lambda group: order.index(group["task"]) if group["task"] in order else len(order)
    )


def average_model(benchmarks: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """Average a model over benchmarks, each counting the same.

    Returns:
        `retained_percent` and `mean_tokens` (None where no benchmark has one), and `num_benchmarks` that have a
        retained percentage.
    """
    runs = [group["runs"][model] for group in benchmarks if model in group["runs"]]
    retained = [run["retained_percent"] for run in runs if run["retained_percent"] is not None]
    tokens = [run["mean_tokens"] for run in runs if run["mean_tokens"] is not None]
    return {
        "retained_percent": sum(retained) / len(retained) if retained else None,
        "num_benchmarks": len(retained),
        "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
    }


def tabulate(
    benchmarks: Sequence[Mapping[str, Any]], models: Sequence[str], average: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Make the rows of the overview: a benchmark each, and the average."""
    rows = []
    for group in benchmarks:
        partial = any(run["missing"] for run in group["runs"].values())
        row: dict[str, Any] = {"Benchmark": group["label"] + (f" {MARK}" if partial else "")}
        for model in models:
            row |= list_cells(model, group["runs"].get(model, {}), is_first=model == models[0])
        rows.append(row)
    last: dict[str, Any] = {"Benchmark": AVERAGE_LABEL}
    for model in models:
        last |= list_cells(model, average[model], is_first=model == models[0])
    return [*rows, last]


def list_cells(model: str, run: Mapping[str, Any], is_first: bool) -> dict[str, Any]:
    """Return a model's cells of one row by column title; the first model has no percentage of itself."""
    cells = {model: run.get("headline"), f"{model} %": run.get("retained_percent"), f"{model} tok": None}
    cells[f"{model} tok"] = run.get("mean_tokens")
    if is_first:
        del cells[f"{model} %"]
    return cells


def explain_columns(
    benchmarks: Sequence[Mapping[str, Any]], models: Sequence[str], average: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Say what the columns are and how the averages come about."""
    notes = []
    if len(models) > 1:
        counts = {average[model]["num_benchmarks"] for model in models[1:]}
        over = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        notes.append(
            f"%: score in percent of {models[0]}'s on the same benchmark, MME's points like the others' percentages; "
            f"its average is the plain mean over the {over} benchmarks that both have, all counting the same."
        )
    notes.append(
        "tok: mean number of visual tokens that the language model read per question with a picture; "
        "the average is the plain mean over benchmarks."
    )
    if any(run["offline_judge"] for group in benchmarks for run in group["runs"].values()):
        notes.append(
            "[judge: exact]: an offline stand-in compared texts where the benchmark asks a language model; "
            "such a number compares with others of its kind only."
        )
    return notes


def explain_partial(benchmarks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the scores to which answers are missing."""
    return [
        f"{MARK} {group['label']}: {run['missing']} answers of {model} are missing."
        for group in benchmarks
        for model, run in group["runs"].items()
        if run["missing"]
    ]


def list_numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report as JSON data: an overview's unrounded numbers, or the rows of each benchmark's table."""
    if "benchmarks" not in report:
        return report["tables"]
    return {name: value for name, value in report.items() if name != "tables"}


def format_markdown(report: Mapping[str, Any]) -> str:
    """Write a report as Markdown."""
    parts = [f"{title}\n\n{format_table(rows)}" if title else format_table(rows) for title, rows in named(report)]
    return "\n\n".join([*parts, *report["notes"]])


def format_latex(report: Mapping[str, Any]) -> str:
    r"""Write a report as LaTeX tables, for a document that has `\usepackage{booktabs}`."""
    parts = [_format_tabular(title, rows) for title, rows in named(report)]
    return "\n\n".join([*parts, *(f"% {note}" for note in report["notes"])]) + "\n"


def _format_tabular(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    titles = list(rows[0])
    lines = [[escape_latex(format_cell(row.get(name))) for name in titles] for row in rows]
    bodies = [f"{' & '.join(line)} \\\\" for line in lines]
    if rows[-1][titles[0]] == AVERAGE_LABEL:
        bodies.insert(len(bodies) - 1, r"\midrule")
    return "\n".join(
        [
            *([f"% {title}"] if title else []),
            rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
            r"\toprule",
            f"{' & '.join(map(escape_latex, titles))} \\\\",
            r"\midrule",
            *bodies,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def escape_latex(text: str) -> str:
    """Write a text so that LaTeX prints it as it is."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in text)


def write_text(path: Path, text: str) -> None:
    """Write a text file; it appears complete or not at all."""
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def write_picture(path: Path, report: Mapping[str, Any]) -> None:
    """Draw a report's tables below one another into a PNG file."""
    # The other forms need no drawing library.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = [(title, _to_text(rows)) for title, rows in named(report)]
    notes = list(report["notes"])
    width = max(sum(_measure_columns(cells)) for _, cells in tables) * INCHES_PER_CHARACTER + 0.4
    notes = [line for note in notes for line in _wrap(note, int(width / (0.8 * INCHES_PER_CHARACTER)))]
    num_rows = sum(len(cells) + 2 * bool(title) for title, cells in tables) + len(tables) + len(notes)
    height = num_rows * INCHES_PER_ROW + 0.2
    figure = Figure(figsize=(width, height), dpi=PICTURE_DPI, facecolor="white")
    place = 1 - 0.1 / height
    row_height = INCHES_PER_ROW / height
    for title, cells in tables:
        if title:
            figure.text(0.2 / width, place - 1.5 * row_height, title, fontsize=9, weight="bold", va="center")
            place -= 2 * row_height
        place = _draw_table(figure, cells, place, row_height, width) - row_height / 2
    for note in notes:
        place -= row_height * 0.8
        figure.text(0.2 / width, place, note, fontsize=6.5, color="#555555", va="center")
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            FigureCanvasAgg(figure).print_png(file)
        partial.replace(path)


def _draw_table(figure: Any, cells: Sequence[Sequence[str]], top: float, row_height: float, width: float) -> float:
    """Draw text cells, the first row as the head, the first column at the left; return where the table ends."""
    from matplotlib.lines import Line2D

    columns = _measure_columns(cells)
    left, right = 0.2 / width, 1 - 0.2 / width

    def rule(place: float, thickness: float) -> None:
        figure.add_artist(Line2D([left, right], [place, place], color="black", linewidth=thickness))

    rule(top, 1.0)
    for number, row in enumerate(cells):
        middle = top - (number + 0.5) * row_height
        start = left
        for column, (cell, characters) in enumerate(zip(row, columns, strict=True)):
            end = start + characters * INCHES_PER_CHARACTER / width
            weight = "bold" if number == 0 or row[0] == AVERAGE_LABEL else "normal"
            place, side = (start, "left") if column == 0 else (end, "right")
            figure.text(place, middle, cell, fontsize=8, weight=weight, ha=side, va="center", parse_math=False)
            start = end
        if number == 0 or (number == len(cells) - 2 and cells[-1][0] == AVERAGE_LABEL):
            rule(top - (number + 1) * row_height, 0.5)
    bottom = top - len(cells) * row_height
    rule(bottom, 1.0)
    return bottom


def _to_text(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    titles = list(rows[0])
    return [titles, *([format_cell(row.get(title)) for title in titles] for row in rows)]


def _measure_columns(cells: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of each column in characters, with its gap."""
    return [max(len(row[column]) for row in cells) + 2 for column in range(len(cells[0]))]


def _wrap(text: str, characters: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(characters, 40))


def named(report: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """List a report's tables that have rows, with their titles."""
    return [(title, rows) for title, rows in report["tables"].items() if rows]
