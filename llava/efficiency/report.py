"""The figures of one or two token reductions: as JSON data, as a table, as a plot of stacked bars."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from llava.efficiency import cost
from llava.efficiency.cost import DECODE, Precision, Reduction, Workload
from llava.efficiency.shapes import ModelShape
from llava.efficiency.timing import Spread, ratio_by_round
from llava.files import write_bytes

STAGES = ("preprocess", "vision tower", "text tower", "selection", "projector", "prefill", "decode")
TERA = 1e12
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
NAME_WIDTH, CELL_WIDTH = 34, 30


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


def format_table(report: dict[str, Any]) -> str:
    """Write a report as a table for the terminal: one column per run."""
    runs = report["runs"]
    lines = [f"{report['model']}: " + ", ".join(f"{key} {value}" for key, value in report["workload"].items())]
    lines += [_row("", [run["reduce"] for run in runs])]
    lines += [_row("kept patches", [f"{run['kept_patches']} of {run['num_patches']}" for run in runs])]
    lines += [_row("image tokens / prompt length", [f"{r['image_tokens']} / {r['prompt_length']}" for r in runs])]
    for title, key, unit in (
        ("prefill per prompt", "prefill_flops_per_prompt", "FLOPs"),
        ("  logits of the last position only", "prefill_flops_per_prompt_last_logits", "FLOPs"),
        ("all stages, whole batch", "total_flops", "FLOPs"),
        ("KV cache, whole batch", "kv_cache_bytes", "B"),
    ):
        lines += [_row(title, [format_quantity(run[key], unit) for run in runs])]
    lines += [_row("weights", [format_quantity(run["weight_bytes"]["all"], "B") for run in runs])]
    if any(run["peak_bytes_beyond_weights"] is not None for run in runs):
        peaks = [run["peak_bytes_beyond_weights"] for run in runs]
        lines += [
            _row("peak memory beyond weights", ["-" if peak is None else format_quantity(peak, "B") for peak in peaks])
        ]
    lines += _stage_lines(runs)
    lines += [f"kept patches of {run['reduce']}: {run['kept_source']}" for run in runs if run["kept_source"]]
    for run, ratios in zip(runs[1:], report["ratios"], strict=True):
        lines.append(f"{run['reduce']} / {runs[0]['reduce']}: {_format_ratios(ratios)}")
    return "\n".join(lines)


def format_quantity(value: float, unit: str) -> str:
    """Write a number with a decimal prefix, such as `8.672 TFLOPs`."""
    for scale, prefix in PREFIXES:
        if value >= scale:
            return f"{value / scale:.3f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def draw_bars(report: dict[str, Any], path: Path) -> None:
    """Draw the stages as stacked bars, one bar per run: seconds where measured, else FLOPs.

    Raises:
        FileError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs, steps = report["runs"], max(0, report["workload"]["new_tokens"] - 1)
    measured = all(run["end_to_end_seconds"] for run in runs)
    figure, axes = pyplot.subplots(figsize=(7.5, 1.6 + 0.8 * len(runs)))
    left = [0.0] * len(runs)
    for name in STAGES:
        stages = [run["stages"].get(name) or {} for run in runs]
        values = [
            (stage.get("seconds") or {}).get("median", 0) if measured else stage.get("flops", 0) for stage in stages
        ]
        values = [value * (steps if name == DECODE else 1) / (1e-3 if measured else TERA) for value in values]
        label = f"{name} x {steps}" if name == DECODE else name
        axes.barh([run["reduce"] for run in runs], values, left=left, label=label)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per batch" if measured else "TFLOPs per batch")
    axes.set_title(f"{report['model']}, batch {report['workload']['batch_size']}", fontsize="medium")
    axes.legend(fontsize="small", ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.35), frameon=False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    write_bytes(path, image.getvalue())


def _stages_of(costs: dict[str, cost.Cost], measurement: Any) -> list[str]:
    return [name for name in STAGES if name in costs or (measurement and name in measurement.stages)]


def _describe_stage(name: str, costs: dict[str, cost.Cost], measurement: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {}
    if name in costs:
        stage |= {"flops": costs[name].flops, "bytes": costs[name].bytes, "flops_per_byte": costs[name].intensity}
    if measurement and name in measurement.stages:
        stage["seconds"] = asdict(measurement.stages[name])
    return stage


def _stage_lines(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for name in STAGES:
        stages = [run["stages"].get(name) for run in runs]
        if any(stages):
            title = "decode, one step" if name == DECODE else name
            lines.append(_row(title, [_format_stage(stage) for stage in stages]))
    if any(run["end_to_end_seconds"] for run in runs):
        spreads = [run["end_to_end_seconds"] for run in runs]
        lines.append(_row("generate, end to end", ["-" if s is None else _milliseconds(s) for s in spreads]))
    return lines


def _format_stage(stage: dict[str, Any] | None) -> str:
    if not stage:
        return "-"
    if "seconds" in stage:
        return _milliseconds(stage["seconds"])
    return f"{format_quantity(stage['flops'], 'FLOPs')}, {stage['flops_per_byte']:.1f}/byte"


def _milliseconds(spread: dict[str, float]) -> str:
    return Spread(**spread).format(1e3, digits=2) + " ms"


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:<{NAME_WIDTH}}" + "".join(f"  {cell:>{CELL_WIDTH}}" for cell in cells)


def _format_ratios(ratios: dict[str, Any]) -> str:
    parts = []
    for name, value in ratios.items():
        if value is not None:
            number = Spread(**value).format(digits=2) if isinstance(value, dict) else f"{value:.2f}"
            parts.append(f"{name.replace('_', ' ')} {number}")
    return ", ".join(parts)
