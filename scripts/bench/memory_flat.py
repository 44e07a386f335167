"""Memory of the evaluation runner over many questions; it must stay flat.

python -m scripts.bench.memory_flat --questions 20000 --plot docs/figures/memory_flat.png
"""
# ruff: noqa: T201

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.bench import side_by_side


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = side_by_side.make_parser(__doc__, repeats=False)
    parser.add_argument("--model-path", default=str(side_by_side.CHECKPOINT))
    parser.add_argument("--reduce", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser


if __name__ == "__main__":  # before torch is imported, which takes seconds
    make_parser().parse_args()

from llava.efficiency.memory import heap_bytes, resident_bytes
from llava.errors import InputError, run_command
from llava.eval.benchmark import Row
from llava.eval.predict import Settings, answer_questions
from llava.model.builder import load_pretrained_model

QUESTIONS_PER_IMAGE = 18
MEGABYTE = 1e6
WARM_SHARE = 0.1  # caches fill during the first tenth
TOLD_SHARES = (1 / 30, 1 / 10, 1 / 3, 2 / 3, 0.98, 1)
"""When memory is printed. During the last unit nothing is read ahead, so slightly less is in use."""

Entry = tuple[int, float, int, int]
"""Questions answered, seconds since the start, bytes held by the process, bytes in use on its heap (0: unknown)."""


class CountingSink(side_by_side.MemorySink):
    """Records memory and time at every batch; of the answers it keeps only the keys."""

    def __init__(self) -> None:
        """Start the clock."""
        super().__init__()
        self.start = time.perf_counter()
        self.trace: list[Entry] = []

    def append(self, rows: Sequence[Row]) -> None:
        self.done.update(dict.fromkeys((row["question_id"],) for row in rows))
        self.trace.append((len(self.done), time.perf_counter() - self.start, resident_bytes(), heap_bytes() or 0))


def main() -> None:
    args = make_parser().parse_args()
    if resident_bytes() is None:
        raise InputError("this system does not report a process's memory (no /proc/self/status)")
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, device=args.device, reduce=args.reduce
    )
    with tempfile.TemporaryDirectory() as folder:
        num_images = -(-args.questions // QUESTIONS_PER_IMAGE)
        questions = side_by_side.draw_questions(Path(folder), num_images, QUESTIONS_PER_IMAGE)[: args.questions]
        sink = CountingSink()
        settings = Settings(model_id="bench", batch_size=args.batch_size)
        with side_by_side.hide_progress():
            answer_questions(model, tokenizer, image_processor, questions, sink, settings)
    trace = [entry for entry in sink.trace if entry[0]]
    warm = [entry for entry in trace if entry[0] >= WARM_SHARE * args.questions]
    growth = {"all": grow_per_thousand(warm), "second half": grow_per_thousand(trace[len(trace) // 2 :])}
    print(f"{trace[-1][0]} questions in {trace[-1][1]:.0f} s")
    for share in TOLD_SHARES:
        count, _, held, in_use = next(entry for entry in trace if entry[0] >= share * trace[-1][0])
        print(f"after {count:>6} questions: in use {in_use / MEGABYTE:6.1f} MB, held {held / MEGABYTE:6.1f} MB")
    told = ", ".join(f"{part} {megabytes:.3f}" for part, megabytes in growth.items())
    print(f"growth of what is held, MB per 1000 questions: {told}")
    side_by_side.write_figures({"trace": trace, "growth_megabytes_per_thousand": growth}, args.json)
    if args.plot:
        draw(trace, args.plot)


def grow_per_thousand(trace: Sequence[Entry]) -> float:
    """Return the growth in MB per 1000 questions between the first and the last entry of a trace."""
    (first, _, before, _), (last, _, after, _) = trace[0], trace[-1]
    return 1000 * (after - before) / MEGABYTE / max(1, last - first)


def draw(trace: Sequence[Entry], path: Path) -> None:
    """Plot memory over questions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3))
    for column, label in ((2, "held by the process"), (3, "in use on its heap")):
        axes.plot([entry[0] for entry in trace], [entry[column] / MEGABYTE for entry in trace], label=label)
    axes.legend(loc="lower right")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("questions answered")
    axes.set_ylabel("memory, MB")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    run_command(main)
