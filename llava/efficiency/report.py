"""The figures of one or two token reductions: as JSON data, as a table, as a plot of stacked bars."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.drawing import plot_style, write_figure
from llava.efficiency import cost
from llava.efficiency.cost import DECODE, Precision, Reduction, Workload
from llava.efficiency.shapes import ModelShape
from llava.efficiency.timing import Spread, ratio_by_round
from llava.terminal import find_width, lay_out

STAGES = ("preprocess", "vision tower", "text tower", "selection", "projector", "prefill", "decode")
TERA = 1e12
PLOT_WIDTH, BAR = 9.0, 0.55
"""Inches: of the plot, and of the height of a bar."""
WIDE = 0.07
"""Share of the longest bar from which a stage has its number inside."""
STAGE_COLORS = dict(
    zip(STAGES, ("#8c959f", "#0a5c9e", "#4ea1d8", "#e8a200", "#7b4ea3", "#1a7f37", "#bc4c00"), strict=True)
)
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Run:
    """One token reduction of the table.

    Attributes:
        label: its spec string, or "none".
        reduction: tokens that are left; measured where an image was measured.
        kept_source: where the number of kept patches comes from.
        measurement: `stages.Measurement`, or None for counting alone.
    """

    label: str
    reduction: Reduction
    kept_source: str
    measurement: Any = None


@dataclass(frozen=True)
class Setting:
    """What all runs of a report have in common."""

    model: str
    shape: ModelShape
    work: Workload
    precision: Precision
    description: dict[str, Any]


def describe(setting: Setting, runs: Sequence[Run]) -> dict[str, Any]:
    """Put everything into plain data; FLOPs and bytes are of the whole batch, "decode" is one step.

    Args:
        setting: what the runs share.
        runs: the first is the one asked about, a second one is what it is compared with.
    """
    return {
        "model": setting.model,
        **setting.description,
        "workload": asdict(setting.work),
        "parameters": cost.count_parameters(setting.shape),
        "runs": [describe_run(setting, run) for run in runs],
        "ratios": [compare(setting, runs[0], run) for run in runs[1:]],
    }


def describe_run(setting: Setting, run: Run) -> dict[str, Any]:
    """Put one run into plain data."""
    shape, work, precision = setting.shape, setting.work, setting.precision
    lengths = cost.prompt_lengths(shape.language, run.reduction, work)
    costs = cost.stage_costs(shape, run.reduction, work, precision)
    weights = cost.weight_bytes(shape, precision, with_text=run.reduction.reads_text)
    answered = [length + work.new_tokens for length in lengths]
    cache = cost.cache_bytes(shape.language, answered, precision.language)
    return {
        "reduce": run.label,
        "kept_patches": run.reduction.num_kept,
        "kept_source": run.kept_source,
        "num_patches": shape.tower.num_patches,
        "image_tokens": run.reduction.num_tokens,
        "image_tokens_mean_over_layers": run.reduction.mean_tokens(shape.language.layers),
        "prompt_length": lengths[0],
        "prefill_flops_per_prompt": cost.prefill_flops(shape.language, lengths),
        "prefill_flops_per_prompt_last_logits": cost.prefill_flops(shape.language, lengths, num_logits=1),
        "weight_bytes": weights | {"all": sum(weights.values())},
        "kv_cache_bytes": work.batch_size * cache,
        "total_flops": cost.total_flops(costs, work),
        "stages": {name: _describe_stage(name, costs, run.measurement) for name in _stages_of(costs, run.measurement)},
        "end_to_end_seconds": asdict(run.measurement.end_to_end) if run.measurement else None,
        "peak_bytes_beyond_weights": run.measurement.peak_bytes if run.measurement else None,
    }


def compare(setting: Setting, run: Run, against: Run) -> dict[str, Any]:
    """Divide what `against` takes by what `run` takes: above 1 the run is cheaper."""
    mine, other = (describe_run(setting, each) for each in (run, against))
    ratios: dict[str, Any] = {
        name: other[name] / mine[name]
        for name in ("image_tokens", "prefill_flops_per_prompt", "kv_cache_bytes", "total_flops")
        if mine[name]
    }
    if run.measurement and against.measurement:
        ratios["end_to_end_seconds"] = asdict(ratio_by_round(against.measurement.rounds, run.measurement.rounds))
        peaks = other["peak_bytes_beyond_weights"], mine["peak_bytes_beyond_weights"]
        ratios["peak_bytes_beyond_weights"] = peaks[0] / peaks[1] if all(peaks) else None
    return ratios


def format_table(report: dict[str, Any], width: int | None = None) -> str:
    """Write a report as a table: a line of the workload, a column per run, the ratios.

    Args:
        report: by `describe`.
        width: columns of text at most; None: the terminal's.
    """
    runs, width = report["runs"], width or find_width()
    work = ", ".join(f"{name} {value}" for name, value in report["workload"].items())
    rows = [("kept patches", [f"{r['kept_patches']} of {r['num_patches']}" for r in runs])]
    rows += [("image tokens / prompt length", [f"{r['image_tokens']} / {r['prompt_length']}" for r in runs])]
    for title, key, unit in (
        ("prefill per prompt", "prefill_flops_per_prompt", "FLOPs"),
        ("  last position's logits only", "prefill_flops_per_prompt_last_logits", "FLOPs"),
        ("all stages, whole batch", "total_flops", "FLOPs"),
        ("KV cache, whole batch", "kv_cache_bytes", "B"),
    ):
        rows += [(title, [format_quantity(run[key], unit) for run in runs])]
    rows += [("weights", [format_quantity(run["weight_bytes"]["all"], "B") for run in runs])]
    peaks = [run["peak_bytes_beyond_weights"] for run in runs]
    if any(peak is not None for peak in peaks):
        told = ["-" if peak is None else format_quantity(peak, "B") for peak in peaks]
        rows += [("peak memory beyond weights", told)]
    rows += _stage_rows(runs)
    cells = [[title, *values] for title, values in rows]
    table = lay_out(["", *(run["reduce"] for run in runs)], cells, range(1, len(runs) + 1), width=width)
    lines = [f"kept patches of {run['reduce']}: {run['kept_source']}" for run in runs if run["kept_source"]]
    for run, ratios in zip(runs[1:], report["ratios"], strict=True):
        lines.append(f"{run['reduce']} / {runs[0]['reduce']}: {_format_ratios(ratios)}")
    lines = [f"{report['model']}: {work}", *lines]
    first, *others = (textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
    return "\n".join([first, table, *others])


def format_quantity(value: float, unit: str, digits: int = 3) -> str:
    """Write a number with a decimal prefix, such as `8.672 TFLOPs`."""
    for scale, prefix in PREFIXES:
        if value >= scale:
            return f"{value / scale:.{digits}f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def draw_bars(report: dict[str, Any], path: Path) -> None:
    """Draw the stages as stacked bars, one bar per run: seconds where measured, else FLOPs.

    At a bar's end is its total: of seconds the whole call's, which is not quite the sum of the stages.

    Args:
        report: by `describe`.
        path: a .png, .pdf or .svg.

    Raises:
        FileError: the file cannot be written.
        InputError: another ending.
    """
    from matplotlib.figure import Figure

    runs = report["runs"]
    bars, unit = measure_bars(report)
    totals = [total for _, total in bars]
    with plot_style():
        figure = Figure(figsize=(PLOT_WIDTH, 1.9 + BAR * len(runs)), layout="constrained")
        axes = figure.subplots()
        longest = max(max(totals), *(sum(stages.values()) for stages, _ in bars))
        for number, (stages, total) in enumerate(bars):
            left = 0.0
            for name, value in stages.items():
                axes.barh(number, value, 0.62, left, color=STAGE_COLORS[name])
                if value > WIDE * longest:
                    axes.text(left + value / 2, number, _three(value), color="white", ha="center", va="center")
                left += value
            share = f"  ({total / totals[0]:.2f} x)" if number else ""
            text = f"{_three(total)} {unit}{share}"
            axes.text(max(left, total) + 0.012 * longest, number, text, va="center", weight="bold")
        # The legend has a row of its own above the bars, inside the frame.
        names = [name for name in STAGES if any(stages.get(name) for stages, _ in bars)]
        steps = report["workload"]["new_tokens"] - 1
        labels = [f"{name}, {steps} steps" if name == DECODE else name for name in names]
        handles = [axes.barh(0, 0, color=STAGE_COLORS[name]) for name in names]
        axes.legend(handles, labels, loc="upper left", ncols=len(names), fontsize=8, frameon=False, handlelength=1.0)
        axes.set_yticks(range(len(runs)), [textwrap.fill(run["reduce"], 22) for run in runs])
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(0, 1.27 * longest), ylim=(len(runs) - 0.5, -1.15), xlabel=f"{unit} per batch")
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(tell_bars(report, totals, unit), weight="bold", fontsize=11.5, x=0.01, ha="left")
        axes.set_title(describe_bars(report), fontsize=8.5, color="#57606a", loc="left")
        write_figure(path, figure)


def measure_bars(report: dict[str, Any]) -> tuple[list[tuple[dict[str, float], float]], str]:
    """Return the stages of each run with its total, and their unit: that of all runs where all are measured."""
    runs, steps = report["runs"], max(0, report["workload"]["new_tokens"] - 1)
    measured = all(run["end_to_end_seconds"] for run in runs)
    scale, unit = (1e-3, "ms") if measured else (TERA, "TFLOPs")
    bars = []
    for run in runs:
        stages = {}
        for name in STAGES:
            stage = run["stages"].get(name) or {}
            value = (stage.get("seconds") or {}).get("median", 0.0) if measured else stage.get("flops", 0)
            stages[name] = value * (steps if name == DECODE else 1) / scale
        bars.append((stages, run["end_to_end_seconds"]["median"] / scale if measured else sum(stages.values())))
    return bars, unit


def tell_bars(report: dict[str, Any], totals: Sequence[float], unit: str) -> str:
    """Say in a line what the plot shows: the first run's share of what the full model takes, or the costliest one."""
    names, what = [run["reduce"] for run in report["runs"]], "time" if unit == "ms" else "FLOPs"
    if len(names) == 1:
        return f"{names[0]}: {_three(totals[0])} {unit} per batch"
    whole = names.index("none") if "none" in names else totals.index(max(totals))
    own = 0 if whole else min(range(1, len(names)), key=lambda number: totals[number])
    owner = "the full model" if names[whole] == "none" else names[whole]
    return f"{names[own]} takes {100 * totals[own] / totals[whole]:.0f} % of {owner}'s {what}"


def _three(value: float) -> str:
    """Write a number with three digits, or all that it has before the point."""
    return f"{value:.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def describe_bars(report: dict[str, Any]) -> str:
    """Say below the title what was asked of which model, and on what machine."""
    work = report["workload"]
    parts = [
        report["model"],
        f"batch {work['batch_size']}",
        f"prompt of {work['prompt_tokens']} tokens and the image's",
        f"answer of {work['new_tokens']}",
        *(str(report[name]) for name in ("dtype", "device") if report.get(name)),
    ]
    return ", ".join(parts)


def _stages_of(costs: dict[str, cost.Cost], measurement: Any) -> list[str]:
    return [name for name in STAGES if name in costs or (measurement and name in measurement.stages)]


def _describe_stage(name: str, costs: dict[str, cost.Cost], measurement: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {}
    if name in costs:
        stage |= {"flops": costs[name].flops, "bytes": costs[name].bytes, "flops_per_byte": costs[name].intensity}
    if measurement and name in measurement.stages:
        stage["seconds"] = asdict(measurement.stages[name])
    return stage


def _stage_rows(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    rows = []
    for name in STAGES:
        stages = [run["stages"].get(name) for run in runs]
        if any(stages):
            rows.append(("decode, one step" if name == DECODE else name, [_format_stage(stage) for stage in stages]))
    if any(run["end_to_end_seconds"] for run in runs):
        spreads = [run["end_to_end_seconds"] for run in runs]
        rows.append(("generate, end to end", ["-" if s is None else _milliseconds(s) for s in spreads]))
    return rows


def _format_stage(stage: dict[str, Any] | None) -> str:
    if not stage:
        return "-"
    if "seconds" in stage:
        return _milliseconds(stage["seconds"])
    return f"{format_quantity(stage['flops'], 'FLOPs', 1)}, {stage['flops_per_byte']:.1f}/byte"


def _milliseconds(spread: dict[str, float]) -> str:
    return Spread(**spread).format(1e3, digits=2) + " ms"


def _format_ratios(ratios: dict[str, Any]) -> str:
    parts = []
    for name, value in ratios.items():
        if value is not None:
            number = Spread(**value).format(digits=2) if isinstance(value, dict) else f"{value:.2f}"
            parts.append(f"{name.replace('_', ' ')} {number}")
    return ", ".join(parts)
