"""The figures of a GPU run as Markdown tables: `python -m scripts.gpu.report OUT`."""
# ruff: noqa: T201

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu.report", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder that scripts/gpu.sh wrote")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

from llava.efficiency.report import STAGES, format_quantity
from llava.efficiency.timing import Spread
from llava.errors import InputError, run_command
from scripts.gpu.__main__ import PARTS
from scripts.gpu.parts import Figures, read_part

MILLI = 1e3
Rows = list[list[str]]


def main() -> None:
    out = make_parser().parse_args().out
    found = {part: read_part(out / f"{part}.json") for part in PARTS}
    found = {part: figures for part, figures in found.items() if figures}
    if not found:
        raise InputError(f"{out} holds no figures: run `bash scripts/gpu.sh {out}` on a machine with a GPU")
    for part, figures in found.items():
        print("\n".join(write_part(part, figures)))


def write_part(part: str, figures: Figures) -> list[str]:
    """Write a part: a heading with the machine, its tables, and what was not measured."""
    machine = figures["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, transformers {machine['transformers']}"
    state = "" if figures["complete"] else " (not complete)"
    steps = figures["steps"]
    measured = {name: step for name, step in steps.items() if not {"skipped", "out_of_memory"} & step.keys()}
    lines = [f"#### {part}: {machine['model']}, {where}{state}", "", *WRITERS[part](measured)]
    for name, step in steps.items():
        if name not in measured:
            lines.append(f"- {name}: {step.get('skipped') or 'out of memory'}")
        lines += [f"- {name}, left out: {reason}" for reason in step.get("left_out", {}).values()]
    return [*lines, ""]


def write_parity(steps: dict[str, Figures]) -> list[str]:
    rows: Rows = []
    for name, step in steps.items():
        differ = f" (at most {step['kept_differ_by']} differ)" if "kept_differ_by" in step else ""
        error = f"{step['logit_error']:.1e}" if "logit_error" in step else "-"
        rows.append([name, str(step["cases"]), f"{step['kept_equal']}{differ}", str(step["ids_equal"]), error])
    return table(["", "cases", "kept patches equal", "answers equal", "largest relative error of logits"], rows)


def write_stages(steps: dict[str, Figures]) -> list[str]:
    rows: Rows = []
    for name, step in steps.items():
        for run in step["runs"]:
            seconds = [run["stages"].get(stage, {}).get("seconds") for stage in STAGES]
            ratio = _over(step, run)
            times = [middle(one) for one in [*seconds, run["end_to_end_seconds"]]]
            rows.append([name, run["reduce"], *times, size(run["peak_bytes_beyond_weights"]), ratio])
    heads = ["", "reduction", *(f"{stage}, ms" for stage in STAGES), "end to end, ms", "peak beyond weights"]
    return table([*heads, "none over it"], rows)


def _over(step: Figures, run: Figures) -> str:
    """How much longer the full model takes than a run of the same step."""
    seconds = {each["reduce"]: each["end_to_end_seconds"]["median"] for each in step["runs"]}
    return "" if run["reduce"] == "none" else f"{seconds['none'] / seconds[run['reduce']]:.2f}"


def write_loop(steps: dict[str, Figures]) -> list[str]:
    rows: Rows = []
    for name, step in steps.items():
        rates = [spread(step["per_second"][loop]) for loop in ("runner", "naive")]
        rows.append([name, *rates, spread(step["ratio"]), "{} of {}".format(*step["same_answers"])])
    return table(["", "runner, questions per second", "plain loop", "ratio", "same answers"], rows)


def write_serve(steps: dict[str, Figures]) -> list[str]:
    rows: Rows = []
    for name, step in steps.items():
        for run in step["runs"]:
            times = [" / ".join(f"{value:.0f}" for value in run[key]) for key in ("first_ms", "latency_ms")]
            differing = f"{step['answers_differing']} of {step['answers']}"
            rate = f"{run['requests_per_second']:.1f}"
            rows.append([name, run["source"], str(run["clients"]), rate, *times, differing])
    heads = ["", "", "clients", "requests per second", "first token, ms: 50 / 95 / 99 %", "answer, ms: 50 / 95 / 99 %"]
    return table([*heads, "answers that differ"], rows)


def write_training(steps: dict[str, Figures]) -> list[str]:
    rows: Rows = []
    for name, step in steps.items():
        for spec, run in step["steps"].items():
            rates = [spread(run["samples_per_second"], 1, 2), spread(run["tokens_per_second"], 1, 0)]
            ratio = spread(step["ratio"], 1, 2) if spec != "none" else ""
            rows.append(
                [name, spec, spread(run["seconds"], MILLI), *rates, size(run["peak_bytes_beyond_weights"]), ratio]
            )
    heads = ["LoRA, batch 4", "reduction", "step, ms", "samples per second", "tokens per second", "peak beyond weights"]
    return table([*heads, "none over it"], rows)


def write_tests(steps: dict[str, Figures]) -> list[str]:
    rows = [
        [name, str(step["num_passed"]), str(step["num_skipped"]), ", ".join(step["failed"]) or "none"]
        for name, step in steps.items()
    ]
    return table(["", "passed", "skipped", "failed"], rows)


WRITERS: dict[str, Callable[[dict[str, Figures]], list[str]]] = {
    "parity": write_parity,
    "stages": write_stages,
    "methods": write_stages,
    "loop": write_loop,
    "serve": write_serve,
    "training": write_training,
    "tests": write_tests,
}


def table(heads: Sequence[str], rows: Rows) -> list[str]:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines] if rows else []


def spread(values: dict[str, float], scale: float = 1, digits: int = 1) -> str:
    return Spread(**values).format(scale, digits)


def middle(values: dict[str, float] | None) -> str:
    """The median in milliseconds."""
    return "-" if values is None else f"{values['median'] * MILLI:.1f}"


def size(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else format_quantity(num_bytes, "B")


if __name__ == "__main__":
    run_command(main)
