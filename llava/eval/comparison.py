"""From runs to evidence: a cell per method, budget and benchmark, and the tables and plots of `compare`."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from llava.eval.benchmark import Verdict
from llava.eval.compare import FULL, POOL, RANDOM, REFERENCE, Entry, TaskRuns
from llava.eval.metrics.evidence import (
    Interval,
    PairedDifference,
    Sample,
    headline_interval,
    holm,
    paired_difference,
    retained_interval,
)
from llava.eval.report import fill_notes, format_latex_table, format_table
from llava.eval.results import Result
from llava.eval.samples import make_sample, pair_samples
from llava.files import atomic_write, write_json, write_text
from llava.model.token_reduction import parse_reduction
from llava.terminal import find_width

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Against:
    """A method against another at the same budget, on the same questions.

    Attributes:
        difference: of the headlines, with interval and p-value.
        corrected_p: by Holm, over the methods of this benchmark and budget.
    """

    difference: PairedDifference
    corrected_p: float | None = None

    @property
    def mark(self) -> str:
        """`*` where the corrected p-value is below 0.05."""
        return "*" if self.corrected_p is not None and self.corrected_p < SIGNIFICANT else ""


@dataclass(frozen=True)
class Cell:
    """One method at one budget on one benchmark. Random is the mean over its seeds.

    Attributes:
        task, row: the benchmark, and its label.
        method, budget, spec: as in `Entry`; of Random the first seed's spec.
        count: questions that were scored.
        mean_tokens: visual tokens per question that a layer of the language model reads, on average over layers; None
            without images.
        headline, interval: the score.
        retained, retained_interval: percent of the full model's score; no interval where that is 0.
        num_gained, num_lost, agreement: against the full model: only this one right, only the full one right, percent
            of equal verdicts.
        against_reference, against_random: TRIM, and the mean of Random, at the same budget; None: there is none.
        difficult, num_difficult: mean points, in percent, on the questions that pooling at the same budget gets wrong.
        token_histogram: questions by number of visual tokens.
    """

    task: str
    row: str
    method: str
    budget: int | None
    spec: str
    count: int
    mean_tokens: float | None
    headline: float
    interval: Interval
    retained: float
    retained_interval: Interval | None
    num_gained: int
    num_lost: int
    agreement: float
    against_reference: Against | None = None
    against_random: Against | None = None
    difficult: float | None = None
    num_difficult: int = 0
    token_histogram: dict[int, int] | None = None

    @property
    def label(self) -> str:
        return self.method if self.budget is None else f"{self.method} @{self.budget}"


# ---------------------------------------------------------------------------------------------------------------- cells
def make_cells(runs: TaskRuns, num_layers: int) -> list[Cell]:
    """Compare the runs of one benchmark, in the order of the table; empty without runs.

    Args:
        runs: of the benchmark.
        num_layers: of the language model.
    """
    if runs.missing or not runs.results:
        return []
    groups = group_entries(runs.results)
    full = runs.results[next(entry for entry in runs.results if entry.is_full)]
    cells = [describe(runs, entries, full, num_layers) for entries in groups.values()]
    # Against TRIM and Random at the same budget.
    for kind, name in (("against_reference", REFERENCE), ("against_random", RANDOM)):
        cells = compare_with(runs, groups, cells, kind, name)
    return cells


def group_entries(entries: Iterable[Entry]) -> dict[tuple[str, int | None], list[Entry]]:
    """Group a table's rows: an entry each, but all seeds of Random in one."""
    groups: dict[tuple[str, int | None], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.method, entry.budget), []).append(entry)
    return groups


def describe(runs: TaskRuns, entries: Sequence[Entry], full: Result, num_layers: int) -> Cell:
    """Describe one row of the table, of one run or of several seeds."""
    task, results = runs.task, [runs.results[entry] for entry in entries]
    pairs = [pair_samples(task, result.verdicts, full.verdicts) for result in results]
    sample, whole = average([mine for mine, _, _ in pairs]), pairs[0][1]
    tokens = [average_tokens(result, entries[0].spec, num_layers) for result in results if result.tokens]
    pooled = runs.results.get(
        next((e for e in runs.results if (e.method, e.budget) == (POOL, entries[0].budget)), None)
    )
    hard = find_difficult(pooled)
    points = [each.points for result in results for each in result.verdicts if each.key in hard]
    counts = Counter(
        each.num_tokens for result in results for each in result.verdicts if each.unit == "question" and each.num_tokens
    )
    flips = [pair[2] for pair in pairs]
    return Cell(
        task=task.name,
        row=task.row + results[0].judge_label,
        method=entries[0].method,
        budget=entries[0].budget,
        spec=entries[0].spec,
        count=results[0].count,
        mean_tokens=fmean(tokens) if tokens else None,
        headline=sample.headline,
        interval=headline_interval(sample),
        retained=100 * sample.headline / whole.headline if whole.headline else 0.0,
        retained_interval=Interval(100.0, 100.0) if entries[0].is_full else retained_interval(sample, whole),
        num_gained=round(fmean(each.num_gained for each in flips)),
        num_lost=round(fmean(each.num_lost for each in flips)),
        agreement=fmean(each.agreement for each in flips),
        difficult=100 * fmean(points) if points else None,
        num_difficult=len(hard),
        token_histogram=dict(sorted(counts.items())),
    )


def average_tokens(result: Result, spec: str, num_layers: int) -> float:
    """Average a run's visual tokens over questions and layers; the layers differ where tokens leave between them."""
    inside = parse_reduction(spec).inside
    counts = [each.num_tokens for each in result.verdicts if each.unit == "question" and each.num_tokens]
    if inside is None or not counts:
        return result.tokens.mean_tokens
    return fmean(inside.mean_tokens(count, num_layers) for count in counts)


def find_difficult(pooled: Result | None) -> set[str]:
    """Keys of the questions that pooling gets wrong."""
    verdicts: Sequence[Verdict] = pooled.verdicts if pooled else ()
    return {verdict.key for verdict in verdicts if verdict.unit != "pair" and not verdict.correct}


def average(samples: Sequence[Sample]) -> Sample:
    """Average runs on the same questions, image by image."""
    return replace(samples[0], sums=torch.stack([sample.sums for sample in samples]).mean(dim=0))


def compare_with(
    runs: TaskRuns,
    groups: dict[tuple[str, int | None], list[Entry]],
    cells: Sequence[Cell],
    kind: str,
    name: str,
) -> list[Cell]:
    """Compare each cell with a method at its budget, and correct over the methods of each budget."""
    found: dict[int, Against] = {}
    for number, (cell, entries) in enumerate(zip(cells, groups.values(), strict=True)):
        other = groups.get((name, cell.budget))
        if other is None or other == entries or cell.method == FULL:
            continue
        pairs = [pair_samples(runs.task, runs.results[entries[0]].verdicts, runs.results[e].verdicts) for e in other]
        mine = average([make_sample(runs.task, runs.results[entry].verdicts) for entry in entries])
        against = average([there for _, there, _ in pairs])
        found[number] = Against(paired_difference(mine, against, pairs[0][2]))
    # Random is what methods are held against, not a method: it is not part of a family.
    for budget in {cells[number].budget for number in found}:
        family = [n for n in found if cells[n].budget == budget and cells[n].method not in (RANDOM, POOL)]
        corrected = holm([found[number].difference.p_value for number in family])
        for number, p_value in zip(family, corrected, strict=True):
            found[number] = replace(found[number], corrected_p=p_value)
    return [replace(cell, **{kind: found[n]}) if n in found else cell for n, cell in enumerate(cells)]


# --------------------------------------------------------------------------------------------------------------- tables
def tabulate(cells: Sequence[Cell], times: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Make a benchmark's table: a row per method and budget."""
    rows = []
    for cell in cells:
        seconds = times.get(cell.spec, {})
        rows.append(
            {
                "Method": cell.label,
                "Tokens": cell.mean_tokens,
                "Score": f"{cell.headline:.1f} {format_interval(cell.interval)}",
                "% of full": f"{cell.retained:.1f} {format_interval(cell.retained_interval)}".strip(),
                "to TRIM": format_against(cell.against_reference),
                "to Random": format_against(cell.against_random),
                "+/-": f"{cell.num_gained}/{cell.num_lost}",
                "Agree": cell.agreement,
                "Hard": cell.difficult,
                "Select ms": 1000 * seconds["selection"] if seconds else None,
                "Answer ms": 1000 * seconds["answer"] if seconds else None,
            }
        )
    return rows


def format_interval(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.1f}-{interval.high:.1f}"


def format_against(against: Against | None) -> str | None:
    """Write a difference as `+1.2 p 0.03*`; the star says that it stays below 0.05 after Holm's correction."""
    if against is None:
        return None
    p_value = against.difference.p_value if against.corrected_p is None else against.corrected_p
    return f"{against.difference.value:+.1f} p {p_value:.3f}{against.mark}"


def average_rows(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Average what is retained over benchmarks, for methods that have all of them."""
    tasks = len({cell.task for cell in cells})
    settings = name_settings(cells)
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(f"{cell.method} {settings[cell.task, cell.budget]}".strip(), []).append(cell)
    return [
        {
            "Method": label,
            "Tokens": mean_of(cell.mean_tokens for cell in own),
            "% of full": fmean(cell.retained for cell in own),
            "Better than TRIM": count_marked(own, "against_reference", 1),
            "Worse than TRIM": count_marked(own, "against_reference", -1),
            "Better than Random": count_marked(own, "against_random", 1),
            "Worse than Random": count_marked(own, "against_random", -1),
        }
        for label, own in groups.items()
        if len(own) == tasks
    ]


def lay_out_budgets(cells: Sequence[Cell]) -> dict[str, list[dict[str, Any]]]:
    """Lay out all benchmarks side by side, a table per budget: rows by title.

    A row has the score on each benchmark, "+" or "-" behind it where it differs from TRIM's after the correction; what
    is retained on average; and on how many benchmarks the method is better, and worse, than Random.
    """
    settings = name_settings(cells)
    full = [cell for cell in cells if cell.method == FULL]
    tables: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.method != FULL:
            tables.setdefault(settings[cell.task, cell.budget] or "Budgets of their own", []).append(cell)
    return {title: [_lay_out(own, cells) for own in by_method([*full, *group])] for title, group in tables.items()}


def name_settings(cells: Sequence[Cell]) -> dict[tuple[str, int | None], str]:
    """Name each benchmark's budgets so that the same setting has one name: `@64`, or `matched` where they differ.

    Returns:
        Names by benchmark and budget; empty for a spec with a budget of its own.
    """
    budgets = {own[0].task: [*dict.fromkeys(c.budget for c in own if c.budget is not None)] for own in by_task(cells)}
    names: dict[tuple[str, int | None], str] = {(task, None): "" for task in budgets}
    for own in zip(*budgets.values(), strict=True):
        name = f"@{own[0]}" if len(set(own)) == 1 else "matched"
        names |= dict.fromkeys(zip(budgets, own, strict=True), name)
    return names


def by_method(cells: Sequence[Cell]) -> list[list[Cell]]:
    names = dict.fromkeys(cell.method for cell in cells)
    return [[cell for cell in cells if cell.method == name] for name in names]


def _lay_out(own: Sequence[Cell], cells: Sequence[Cell]) -> dict[str, Any]:
    row: dict[str, Any] = {"Method": own[0].method, "Tokens": mean_of(cell.mean_tokens for cell in own)}
    scores = {cell.row: f"{cell.headline:.1f}{_sign(cell.against_reference)}" for cell in own}
    row |= {name: scores.get(name) for name in dict.fromkeys(cell.row for cell in cells)}
    is_whole = len(own) == len({cell.row for cell in cells})
    row["% of full"] = fmean(cell.retained for cell in own) if is_whole else None
    compared = [cell for cell in own if cell.against_random is not None and cell.method != POOL]
    better, worse = (count_marked(own, "against_random", sign) for sign in (1, -1))
    row["+/- Random"] = f"{better}/{worse} of {len(compared)}" if compared else None
    return row


def _sign(against: Against | None) -> str:
    """ "+" or "-" where a difference stays after the correction."""
    return "" if against is None or not against.mark else ("+" if against.difference.value > 0 else "-")


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def count_marked(cells: Sequence[Cell], kind: str, sign: int) -> int:
    """Count the benchmarks on which a difference of this sign stays after the correction."""
    found = [getattr(cell, kind) for cell in cells]
    return sum(bool(each and each.mark and each.difference.value * sign > 0) for each in found)


NOTES = (
    "Score and % of full come with 95 % intervals over images. `to TRIM` and `to Random` are paired differences at the "
    "same budget with p-values, corrected by Holm over the methods of a benchmark and budget (* below 0.05); Random is "
    "the mean of five seeds. Tokens: of an average layer of the language model. +/-: questions that only this method, "
    "only the full model has right. Hard: percent on the questions that pooling at the same budget gets wrong.",
)


def write_tables(
    folder: Path, tasks: Sequence[TaskRuns], cells: Sequence[Cell], times: dict[str, dict[str, float]]
) -> str:
    """Write `table.md`, `.tex`, `.csv`, `.json` and `overview.md`; return the tables for the terminal."""
    tables = {f"{own[0].row} ({own[0].count} questions)": tabulate(own, times) for own in by_task(cells)}
    if len(tables) > 1:
        tables["Average over the benchmarks"] = average_rows(cells)
    missing = list_missing(tasks)
    notes = [*NOTES, *missing]
    text, narrow = (
        "\n\n".join([part for title, rows in tables.items() for part in (title, format_table(rows, width=width))])
        for width in (None, find_width())
    )
    write_text(folder / "table.md", "\n\n".join([text, *notes]) + "\n")
    layout = [part for title, rows in lay_out_budgets(cells).items() for part in (f"### {title}", format_table(rows))]
    write_text(folder / "overview.md", "\n\n".join(layout) + "\n")
    latex = "\n\n".join(format_latex_table(title, rows) for title, rows in tables.items())
    write_text(folder / "table.tex", f"{latex}\n")
    write_json(folder / "table.json", {"cells": [asdict(cell) for cell in cells], "seconds": times, "missing": missing})
    write_text(folder / "table.csv", format_csv(cells, times))
    return "\n\n".join([narrow, *fill_notes(notes)])


def list_missing(tasks: Sequence[TaskRuns]) -> list[str]:
    """Say what has no row, and why."""
    lines = [f"{runs.task.name}: left out: {runs.missing}" for runs in tasks if runs.missing]
    return lines + [
        f"{runs.task.name}, {label}: left out: {reason}" for runs in tasks for label, reason in runs.left_out.items()
    ]


def by_task(cells: Sequence[Cell]) -> list[list[Cell]]:
    names = dict.fromkeys(cell.task for cell in cells)
    return [[cell for cell in cells if cell.task == name] for name in names]


def format_csv(cells: Sequence[Cell], times: dict[str, dict[str, float]]) -> str:
    """Write a line per cell, every number in a column of its own."""
    rows = []
    for cell in cells:
        row: dict[str, Any] = {
            name: getattr(cell, name)
            for name in ("task", "method", "budget", "spec", "count", "mean_tokens", "headline", "retained")
        }
        for name in ("interval", "retained_interval"):
            interval = getattr(cell, name)
            row |= {f"{name}_low": interval and interval.low, f"{name}_high": interval and interval.high}
        for name in ("against_reference", "against_random"):
            against = getattr(cell, name)
            own = against.difference if against else None
            row |= {
                name: own.value if own else None,
                f"{name}_low": own.interval.low if own else None,
                f"{name}_high": own.interval.high if own else None,
                f"{name}_p": own.p_value if own else None,
                f"{name}_p_holm": against.corrected_p if against else None,
            }
        for name in ("num_gained", "num_lost", "agreement", "difficult", "num_difficult"):
            row[name] = getattr(cell, name)
        row |= {f"{stage}_seconds": times.get(cell.spec, {}).get(stage) for stage in ("selection", "answer")}
        rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["task"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------------- plots
def write_plots(folder: Path, cells: Sequence[Cell]) -> list[Path]:
    """Plot what is retained against tokens, averaged over benchmarks, as SVG, PDF and PNG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in average_rows(cells) if row["Tokens"] is not None]
    methods: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        methods.setdefault(row["Method"].split(" ")[0], []).append((row["Tokens"], row["% of full"]))
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, (method, points) in enumerate(methods.items()):
        style = {"color": "0.5", "linestyle": "--"} if method in (RANDOM, POOL) else {"color": f"C{number % 10}"}
        marker = "osD^v<>pP*X"[number % 11]
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=method, **style)
    axes.set_xlabel("visual tokens per question")
    axes.set_ylabel("% of the full model's score, mean over benchmarks")
    axes.legend(fontsize="small", ncols=2)
    axes.grid(visible=True, alpha=0.3)
    files = []
    for suffix in ("svg", "pdf", "png"):
        file = folder / f"pareto.{suffix}"
        # Without dates and random ids: the same numbers give the same file.
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": None}[suffix]
        with atomic_write(file) as partial, rc_context({"svg.hashsalt": "llava"}):
            figure.savefig(partial, format=suffix, metadata=metadata, dpi=150)
        files.append(file)
    return files
