"""Tables of results: runs of one benchmark side by side, or all benchmarks with a column per model.

The overview compares each model with the first one: its score as a percentage of the first one's, per benchmark and on
average, and the visual tokens it read. Files (Markdown, LaTeX, JSON) have every number, the terminal a narrower table,
the plot the comparison.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import InputError
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.metrics.means import collect
from llava.eval.protocol import require_one_protocol
from llava.eval.results import Result
from llava.files import write_bytes
from llava.terminal import PIPES, find_width, lay_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AVERAGE_LABEL = "Average"
NOTE_SIGN = "*"
"""Beside the label of a row that has a note of its own."""
UNKNOWN = "protocol unknown"
LATEX_ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
PLOT_WIDTH, BAR_HEIGHT, PLOT_DPI = 8.0, 0.17, 160
"""Inches, inches, and pixels per inch."""
TITLE = 64
"""Letters in a line of the plot's title."""

Run = tuple[str, Result]
"""Name of a model, and what it scored on one benchmark."""
Cell = str | float | int | None
TableRow = Mapping[str, Cell]
"""Cells by column title; the first row's titles and order count."""


@dataclass(frozen=True)
class ModelScore:
    """What one model scored on one benchmark; see `Result`.

    `retained_percent` is of the first model's headline; None where either is unknown, or the first not positive.
    `protocol` is the hash of the protocol; None where it is unknown.
    """

    headline: float | None
    retained_percent: float | None
    mean_tokens: float | None
    mean_patches: float | None
    count: int
    missing: int
    judge: str | None
    offline_judge: bool
    unscored: str | None
    protocol: str | None


@dataclass(frozen=True)
class BenchmarkScores:
    """One benchmark with what each model scored on it; different judges are different benchmarks here."""

    label: str
    task: str
    runs: dict[str, ModelScore] = field(default_factory=dict)


@dataclass(frozen=True)
class Average:
    """A model's plain means over benchmarks: over the `num_benchmarks` that it and the first model have, and over those
    that have a number of tokens; None of none.
    """

    retained_percent: float | None
    num_benchmarks: int
    mean_tokens: float | None


@dataclass(frozen=True)
class Report:
    """Runs put together.

    Attributes:
        tables: rows by the table's title, with every number.
        notes: lines that belong below.
        models: names in the order of the columns; empty, as the next two, unless it is an overview.
        benchmarks: in the order of `BENCHMARKS`.
        average: by model.
    """

    tables: Mapping[str, Sequence[TableRow]]
    notes: Sequence[str] = ()
    models: Sequence[str] = ()
    benchmarks: Sequence[BenchmarkScores] = ()
    average: Mapping[str, Average] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return JSON data: an overview's unrounded numbers, or the rows of each benchmark's table."""
        if not self.models:
            return dict(self.tables)
        return {name: value for name, value in asdict(self).items() if name != "tables"}


# ------------------------------------------------------------------------------------------------------------ numbers
def make_report(runs: Sequence[Run], overview: bool | None = None) -> Report:
    """Put runs (name of the model, result) together, in the order of the columns.

    `overview`: a row per benchmark; False: a table per benchmark with a row per run; None: whichever fits. In an
    overview a model cannot have two results of one benchmark.

    Raises:
        InputError: results of one benchmark were measured by different protocols, or a model has two of one benchmark.
    """
    for label, group in collect((result.label, (name, result.protocol)) for name, result in runs).items():
        require_one_protocol(label, group)
    if overview is None:
        overview = len({result.task for _, result in runs}) > 1
    if not overview:
        return Report(compare_runs(runs))
    benchmarks = group_by_benchmark(runs)
    models = list(dict.fromkeys(name for name, _ in runs))
    average = {model: average_model(benchmarks, model) for model in models}
    notes = explain_columns(benchmarks, models, average)
    return Report({"": tabulate(benchmarks, models, average)}, notes, models, benchmarks, average)


def compare_runs(runs: Sequence[Run]) -> dict[str, list[TableRow]]:
    """Put runs side by side, in a table for each benchmark's label: the run, its columns, tokens and percentages."""
    tables: dict[str, list[TableRow]] = {}
    first: dict[str, float | None] = {}
    for name, result in runs:
        label = result.row + result.judge_label
        reference = first.setdefault(label, result.headline)
        is_compared = reference and result.headline is not None
        tokens = result.tokens
        tables.setdefault(label, []).append(
            {
                "Run": f"{name}{describe_doubts(result)}",
                **({"Score": result.unscored} if result.unscored else result.columns),
                "Tokens": tokens.mean_tokens if tokens else None,
                "% of tokens": 100 * tokens.mean_tokens / tokens.mean_patches if tokens else None,
                "% of first": 100 * result.headline / reference if is_compared else None,
            }
        )
    return tables


def describe_doubts(result: Result) -> str:
    """Say what stands behind the name of a run: answers that are missing, a protocol that nobody knows."""
    doubts = [f"{result.missing} answers missing"] * bool(result.missing) + [UNKNOWN] * (result.protocol is None)
    return f" ({', '.join(doubts)})" if doubts else ""


def group_by_benchmark(runs: Sequence[Run]) -> list[BenchmarkScores]:
    """List each benchmark with what every model scored on it, in the order of `BENCHMARKS`."""
    groups: dict[str, BenchmarkScores] = {}
    first = {result.label: result.headline for model, result in runs if model == runs[0][0]}
    for model, result in runs:
        group = groups.setdefault(result.label, BenchmarkScores(result.label, result.task))
        if model in group.runs:
            raise InputError(f"two results of {group.label} for {model}; give each run its own NAME=FILE.json")
        reference, tokens = first.get(result.label) or 0.0, result.tokens
        is_compared = reference > 0 and result.headline is not None
        group.runs[model] = ModelScore(
            headline=result.headline,
            retained_percent=100 * result.headline / reference if is_compared else None,
            mean_tokens=tokens.mean_tokens if tokens else None,
            mean_patches=tokens.mean_patches if tokens else None,
            count=result.count,
            missing=result.missing,
            judge=result.judge,
            offline_judge=result.offline_judge and result.headline_judged,
            unscored=result.unscored,
            protocol=result.protocol.hash if result.protocol else None,
        )
    order = list(BENCHMARKS)
    return sorted(groups.values(), key=lambda group: order.index(group.task) if group.task in order else len(order))


def average_model(benchmarks: Sequence[BenchmarkScores], model: str) -> Average:
    """Average a model over benchmarks, each counting the same."""
    runs = [group.runs[model] for group in benchmarks if model in group.runs]
    retained = [run.retained_percent for run in runs if run.retained_percent is not None]
    tokens = [run.mean_tokens for run in runs if run.mean_tokens is not None]
    means = [sum(values) / len(values) if values else None for values in (retained, tokens)]
    return Average(retained_percent=means[0], num_benchmarks=len(retained), mean_tokens=means[1])


def tabulate(
    benchmarks: Sequence[BenchmarkScores], models: Sequence[str], average: Mapping[str, Average]
) -> list[TableRow]:
    """Make the rows of the overview, a benchmark each and the average; the first model has no percentage of itself."""
    rows = []
    for label, runs in [*((label_row(group), group.runs) for group in benchmarks), (AVERAGE_LABEL, average)]:
        row: dict[str, Cell] = {"Benchmark": label}
        for model in models:
            run = runs.get(model)
            row[model] = (run.unscored or run.headline) if isinstance(run, ModelScore) else None
            if model != models[0]:
                row[f"{model} %"] = run.retained_percent if run else None
            row[f"{model} tok"] = run.mean_tokens if run else None
        rows.append(row)
    return rows


def label_row(group: BenchmarkScores) -> str:
    return group.label + (f" {NOTE_SIGN}" if any(run.missing for run in group.runs.values()) else "")


def explain_columns(
    benchmarks: Sequence[BenchmarkScores], models: Sequence[str], average: Mapping[str, Average]
) -> list[str]:
    """Name the scores to which answers are missing, what the columns are and how the averages come about."""
    scores = [(group, model, run) for group in benchmarks for model, run in group.runs.items()]
    notes = [
        f"{NOTE_SIGN} {group.label}: {run.missing} answers of {model} are missing."
        for group, model, run in scores
        if run.missing
    ]
    unknown = collect((model, group.label) for group, model, run in scores if run.protocol is None)
    if unknown:
        named = "; ".join(f"{model}: {', '.join(labels)}" for model, labels in unknown.items())
        notes.append(f"{UNKNOWN.capitalize()}, from files that do not say how they were measured: {named}.")
    if len(models) > 1:
        counts = sorted({average[model].num_benchmarks for model in models[1:]})
        over = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        notes.append(
            f"%: score in percent of {models[0]}'s on the same benchmark, MME's points like the others' percentages; "
            f"its average is the plain mean over the {over} benchmarks that both have, all counting the same."
        )
    notes.append(
        "Tokens (tok): mean number of visual tokens that the language model read per question with an image; "
        "the average is the plain mean over benchmarks."
    )
    if any(run.offline_judge for _, _, run in scores):
        notes.append(
            "[judge: exact]: an offline stand-in compared texts where the benchmark asks a language model; "
            "such a number compares with others of its kind only."
        )
    return notes


# ----------------------------------------------------------------------------------------------------- text of tables
def format_terminal(report: Report) -> str:
    """Write a report for the terminal: an overview has score and percentage in one column, and mean tokens once."""
    parts = []
    if report.models:
        parts.append(format_table(_narrow(report), report.models, find_width()))
    else:
        for title, rows in report.tables.items():
            parts += [clean(title)] * bool(title) + [format_table(rows, width=find_width())]
    return "\n\n".join([*parts, *fill_notes(report.notes)])


def _narrow(report: Report) -> list[TableRow]:
    """Make the rows of an overview for the terminal."""
    rows = []
    for group in report.benchmarks:
        cells = {}
        for model, run in group.runs.items():
            percent = f" {run.retained_percent:5.1f}%" if run.retained_percent is not None else " " * 7
            cells[model] = (run.unscored or f"{run.headline:.2f}") + (percent if model != report.models[0] else "")
        rows.append({"Benchmark": label_row(group), **{model: cells.get(model) for model in report.models}})
    percents = {
        model: f"{mean.retained_percent:.1f}%"
        for model, mean in report.average.items()
        if mean.retained_percent is not None and model != report.models[0]
    }
    tokens = {model: mean.mean_tokens for model, mean in report.average.items()}
    nothing = dict.fromkeys(report.models)
    return [
        *rows,
        {"Benchmark": AVERAGE_LABEL, **nothing, **percents},
        {"Benchmark": "Tokens, mean", **nothing, **tokens},
    ]


def fill_notes(notes: Sequence[str]) -> list[str]:
    """Break notes to the width of the terminal's tables."""
    return [textwrap.fill(clean(note), find_width()) for note in notes]


def format_markdown(report: Report) -> str:
    """Write a report as Markdown, with every number."""
    parts = []
    for title, rows in report.tables.items():
        parts += [clean(title)] * bool(title) + [format_table(rows)]
    return "\n\n".join([*parts, *map(clean, report.notes)])


def format_table(rows: Sequence[TableRow], right: Sequence[str] | None = None, width: int | None = None) -> str:
    """Write rows as an aligned Markdown table; numbers get two digits, None is a dash.

    Args:
        rows: of the table; none: nothing is written.
        right: columns aligned at the right; None: those without text.
        width: columns of text at most; None: any. See `terminal.lay_out`.
    """
    if not rows:
        return ""
    titles = list(rows[0])
    if right is None:
        right = [title for title in titles if not any(isinstance(row.get(title), str) for row in rows)]
    cells = [[escape_markdown(format_cell(row.get(title))) for title in titles] for row in rows]
    places = [number for number, title in enumerate(titles) if title in right]
    return lay_out(list(map(escape_markdown, titles)), cells, places, PIPES, width)


def format_cell(value: Cell) -> str:
    """Write a table's cell on one line: numbers with a fraction get two digits, None is a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else clean(str(value))


def clean(text: str) -> str:
    """Put a text on one line, without control characters."""
    return re.sub(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029]+\s*", " ", text)


def escape_markdown(text: str) -> str:
    """Write a text so that it stays one cell of a table."""
    return clean(text).replace("|", "\\|")


def format_latex(report: Report) -> str:
    r"""Write a report as LaTeX tables, for a document that has `\usepackage{booktabs}`."""
    parts = [format_latex_table(title, rows) for title, rows in report.tables.items()]
    return "\n\n".join([*parts, *(f"% {clean(note)}" for note in report.notes)]) + "\n"


def format_latex_table(title: str, rows: Sequence[TableRow]) -> str:
    """Write rows, at least one, as a `tabular`, with the title in a comment."""
    titles = list(rows[0])
    bodies = [_format_latex_row([format_cell(row.get(name)) for name in titles]) for row in rows]
    if rows[-1][titles[0]] == AVERAGE_LABEL:
        bodies.insert(len(bodies) - 1, r"\midrule")
    return "\n".join(
        [
            *([f"% {clean(title)}"] if title else []),
            rf"\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}",
            r"\toprule",
            _format_latex_row(titles),
            r"\midrule",
            *bodies,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _format_latex_row(cells: Sequence[str]) -> str:
    line = " & ".join(map(escape_latex, cells))
    # After the \\ of the row before, a * or [ would be taken for its argument.
    return ("{}" if line.startswith(("*", "[")) else "") + line + r" \\"


def escape_latex(text: str) -> str:
    """Write a text so that LaTeX prints it as it is."""
    escaped = "".join(LATEX_ESCAPES.get(character, character) for character in clean(text))
    return re.sub("(?<=-)-", "{}-", escaped)


# --------------------------------------------------------------------------------------------------------------- plot
@dataclass(frozen=True)
class Bars:
    """One panel of the plot: a group of bars per label, a bar per series in it.

    Attributes:
        unit: what the bars measure.
        groups: label of each group, and the value of each series in it.
        series: name of each series in the legend; empty where a group is one bar.
        reference: value and name of the line that the bars are compared with.
    """

    title: str
    unit: str
    groups: Sequence[tuple[str, Sequence[float | None]]]
    series: Sequence[str] = ()
    reference: tuple[float, str] | None = None


def write_plot(path: Path, report: Report) -> None:
    """Draw a report into a PNG file: what each model retains per benchmark, or the score of each run."""
    # The other forms need no drawing library.
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = plan_plot(report)
    num_bars = [sum(len(values) + 1 for _, values in panel.groups) for panel in panels]  # and a gap after each group
    heights = [
        number * BAR_HEIGHT + 0.9 + 0.2 * len(panel.series) for number, panel in zip(num_bars, panels, strict=True)
    ]
    style = {"text.parse_math": False, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context(style):
        figure = Figure(figsize=(PLOT_WIDTH, sum(heights)), dpi=PLOT_DPI, layout="constrained")
        all_axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            draw_bars(axes, panel)
        image = BytesIO()
        FigureCanvasAgg(figure).print_png(image)
    write_bytes(path, image.getvalue())


def plan_plot(report: Report) -> list[Bars]:
    """Decide what the plot shows: percentages of the first model, or scores where there is nothing to compare."""
    if not report.models:
        return [_plan_runs(clean(title), rows) for title, rows in report.tables.items()]
    first, *others = report.models
    names = []
    for model in report.models:
        tokens = report.average[model].mean_tokens
        names.append(clean(model) + (f" ({tokens:.1f} tokens)" if tokens is not None else ""))
    if not others:
        scores = [(clean(group.label), [group.runs[first].headline]) for group in report.benchmarks]
        return [Bars(names[0], "score", scores)]
    rows = [*((label_row(group), group.runs) for group in report.benchmarks), (AVERAGE_LABEL, report.average)]
    groups = [
        (clean(label), [runs[model].retained_percent if model in runs else None for model in others])
        for label, runs in rows
    ]
    title = clean(_tell_best(report.average, first, others))
    return [Bars(title, f"% of {clean(first)}'s score", groups, names[1:], (100.0, names[0]))]


def _tell_best(average: Mapping[str, Average], first: str, others: Sequence[str]) -> str:
    """Say in a line what the plot shows: which model retains most, and with how many tokens."""
    best = max(others, key=lambda model: average[model].retained_percent or 0.0)
    retained, own, whole = average[best].retained_percent, average[best].mean_tokens, average[first].mean_tokens
    if retained is None:
        return f"No score compares with {first}'s"
    tokens = f", with {own:.1f} of {whole:.1f} visual tokens" if own is not None and whole is not None else ""
    return f"{best} retains {retained:.1f} % of {first}'s score{tokens}"


def _plan_runs(title: str, rows: Sequence[TableRow]) -> Bars:
    column = list(rows[0])[1]
    groups = []
    for row in rows:
        tokens = "" if row["Tokens"] is None else f"\n{row['Tokens']:.1f} tokens"
        value = row[column]
        groups.append((clean(str(row["Run"])) + tokens, [None if isinstance(value, str) else value]))
    return Bars(title, column, groups)


def draw_bars(axes: "Axes", panel: Bars) -> None:
    """Draw one panel; every bar has its value beside it, and one that is far longer than the others is cut off."""
    present = sorted(value for _, values in panel.groups for value in values if value is not None)
    # Percentages beside MME's points: the bars of points end at the edge.
    edge = 100.0 if present and present[0] <= 100 < present[-1] / 1.5 else max([*present, 1e-9])
    place, middles = 0.0, []
    for label, values in panel.groups:
        middles.append(place + (len(values) - 1) / 2)
        weight, alpha = ("bold", 1.0) if label == AVERAGE_LABEL or not panel.series else ("normal", 0.75)
        for number, value in enumerate(values):
            length = min(max(value or 0.0, 0.0), edge)
            axes.barh(place, length, 0.92, color=f"C{number}", alpha=alpha)
            text = "-" if value is None else f"{value:.1f}" + " \N{RIGHTWARDS ARROW}" * (value > edge)
            ink = "white" if alpha == 1.0 and length > 0.08 * edge else "black"
            axes.text(0.01 * edge, place, text, va="center", fontsize=7, weight=weight, color=ink)
            place += 1
        place += 1
    axes.set_yticks(middles, [label for label, _ in panel.groups])
    axes.set(ylim=(place - 1.2, -0.8), xlim=(0, 1.02 * edge), xlabel=panel.unit)
    axes.set_title(textwrap.fill(panel.title, TITLE), weight="bold", loc="left", fontsize=10)
    axes.tick_params(axis="y", length=0)
    handles = [axes.barh(0, 0, color=f"C{number}", label=name) for number, name in enumerate(panel.series)]
    if panel.reference:
        value, name = panel.reference
        handles.insert(0, axes.axvline(value, color="#333333", linewidth=1, linestyle="--", label=name))
    if handles:
        axes.figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
